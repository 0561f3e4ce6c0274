# SPDX-License-Identifier: Apache-2.0
"""The routes. What holds data is below /v1, where vLLM asks for its API key; the page has none."""

from __future__ import annotations

import secrets
from functools import cache
from importlib import resources
from typing import Annotated, Any

from fastapi import APIRouter, Depends, HTTPException, Path, Query, Request
from fastapi.responses import HTMLResponse

from ems_vllm.engine.status.answers import Positions, RequestDetail, RequestSummary, Status
from ems_vllm.engine.status.source import Source

router = APIRouter(tags=["kv_compression"])
_NONCE = "{{nonce}}"
# Larger than any model's, and than what the wire takes for an int.
_MOST = 2**20


def _source(request: Request) -> Source:
    source: Source | None = request.app.state.kv_compression_source
    if source is None:
        raise HTTPException(503, "This server has no engine.")
    return source


_Source = Annotated[Source, Depends(_source)]
_RequestId = Annotated[str, Path(max_length=512)]
_UNKNOWN: dict[int | str, dict[str, Any]] = {
    404: {"description": "No such request is remembered, or it has no such kv_head."}
}


@router.get("/v1/kv_compression")
async def status(source: _Source) -> Status:
    """Settings in force, what fits, and what compression has done."""
    return await source.status()


@router.get("/v1/kv_compression/requests")
async def requests(source: _Source) -> list[RequestSummary]:
    """The requests that were compressed last; empty unless the server has `inspect_requests`."""
    return await source.requests()


@router.get("/v1/kv_compression/requests/{request_id}", responses=_UNKNOWN)
async def request(
    source: _Source,
    request_id: _RequestId,
    bins: Annotated[int, Query(ge=1, le=1024, description="Parts of its length.")] = 240,
) -> RequestDetail:
    """Where in its length a request holds entries, by layer and kv_head."""
    found = await source.request(request_id, bins)
    if found is None:
        raise _unknown(request_id)
    return found


@router.get(
    "/v1/kv_compression/requests/{request_id}/layers/{layer}/kv_heads/{kv_head}",
    responses=_UNKNOWN,
)
async def positions(
    source: _Source,
    request_id: _RequestId,
    layer: Annotated[int, Path(ge=0, le=_MOST)],
    kv_head: Annotated[int, Path(ge=0, le=_MOST)],
) -> Positions:
    """Every position that one kv_head has kept."""
    found = await source.positions(request_id, layer, kv_head)
    if found is None:
        raise _unknown(request_id)
    return found


@router.get("/kv_compression", response_class=HTMLResponse)
async def page() -> HTMLResponse:
    """The page; it asks for the rest, and for the API key where there is one."""
    nonce = secrets.token_urlsafe(16)
    allowed = (
        f"default-src 'none'; connect-src 'self'; img-src data:; style-src 'nonce-{nonce}'; "
        f"script-src 'nonce-{nonce}'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    headers = {"Content-Security-Policy": allowed, "Referrer-Policy": "no-referrer"}
    return HTMLResponse(_html().replace(_NONCE, nonce), headers=headers)


def _unknown(request_id: str) -> HTTPException:
    return HTTPException(404, f"Nothing is remembered of request_id={request_id!r}.")


@cache
def _html() -> str:
    return resources.files("ems_vllm.engine.status").joinpath("page.html").read_text("utf-8")
