# SPDX-License-Identifier: Apache-2.0
"""The routes. What holds data is below /v1, where vLLM asks for its API key; the page has none."""

from __future__ import annotations

import secrets
from functools import cache
from importlib import resources
from typing import Annotated, Any

from fastapi import APIRouter, Depends, HTTPException, Path, Query, Request, Response
from fastapi.responses import HTMLResponse
from starlette.convertors import Convertor, register_url_convertor

from ems_vllm.config.errors import shown
from ems_vllm.engine.status.answers import (
    Failure,
    Positions,
    RequestDetail,
    RequestSummary,
    Status,
)
from ems_vllm.engine.status.source import Source
from ems_vllm.keys import LONGEST_NAME

_NONCE = "{{nonce}}"
# Larger than any model's, and than what the wire takes for an int.
_MOST = 2**20
# What is said of prompts is not kept by browsers and proxies, nor part of somebody else's page.
_HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Resource-Policy": "same-origin",
}


def _own_page(request: Request, response: Response) -> None:
    """Refuse the scripts of other sites, which a reader's browser would let in.

    Without further arguments vLLM allows all sites. Here some must be named: a person who can reach
    a server without an API key must not, with a page that they happen to open, tell it the prompts
    of others.
    """
    response.headers.update(_HEADERS)
    origin = request.headers.get("origin")
    if origin is None or origin in request.app.state.kv_compression_origins:
        return
    if origin.partition("://")[2] != request.headers.get("host"):
        raise HTTPException(
            403, f"Origin={shown(origin)} is not allowed: name it in --allowed-origins."
        )


def _source(request: Request) -> Source:
    source: Source | None = request.app.state.kv_compression_source
    if source is None:
        raise HTTPException(503, "This server has no engine.")
    return source


_Source = Annotated[Source, Depends(_source)]


class _Name(Convertor[str]):
    """Of a request, which a client may give: any characters. Starlette's own leave some out."""

    regex = r"[\s\S]+"

    def convert(self, value: str) -> str:
        return value

    def to_string(self, value: str) -> str:
        return value


register_url_convertor("request_name", _Name())
_RequestId = Annotated[str, Path(max_length=LONGEST_NAME)]
_Responses = dict[int | str, dict[str, Any]]
_FAILURES: _Responses = {
    401: {"description": "The server has an API key, and it was not given."},
    "4XX": {"description": "The question is wrong, or of another site.", "model": Failure},
    503: {"description": "The engine is busy; ask later.", "model": Failure},
}
_UNKNOWN: _Responses = {
    404: {
        "description": "No such request is remembered, or it has no such kv_head.",
        "model": Failure,
    }
}
router = APIRouter(tags=["kv_compression"])
_data = APIRouter(prefix="/v1", dependencies=[Depends(_own_page)], responses=_FAILURES)


@_data.get("/kv_compression")
async def status(source: _Source) -> Status:
    """Settings in force, what fits, and what compression has done."""
    return await source.status()


@_data.get("/kv_compression/requests")
async def requests(source: _Source) -> list[RequestSummary]:
    """The requests that were compressed last; empty unless the server has `inspect_requests`."""
    return await source.requests()


# Before the next one, whose names may hold what looks like the rest of this.
@_data.get(
    "/kv_compression/requests/{request_id:request_name}/layers/{layer}/kv_heads/{kv_head}",
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


@_data.get("/kv_compression/requests/{request_id:request_name}", responses=_UNKNOWN)
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


@router.get("/kv_compression", response_class=HTMLResponse)
async def page() -> HTMLResponse:
    """The page; it asks for the rest, and for the API key where there is one."""
    nonce = secrets.token_urlsafe(16)
    allowed = (
        f"default-src 'none'; connect-src 'self'; img-src data:; style-src 'nonce-{nonce}'; "
        f"script-src 'nonce-{nonce}'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    headers = {
        **_HEADERS,
        "Content-Security-Policy": allowed,
        # For browsers that do not know frame-ancestors.
        "X-Frame-Options": "DENY",
        "Referrer-Policy": "no-referrer",
    }
    return HTMLResponse(_html().replace(_NONCE, nonce), headers=headers)


def _unknown(request_id: str) -> HTTPException:
    return HTTPException(404, f"Nothing is remembered of request_id={request_id!r}.")


@cache
def _html() -> str:
    return resources.files("ems_vllm.engine.status").joinpath("page.html").read_text("utf-8")


router.include_router(_data)
