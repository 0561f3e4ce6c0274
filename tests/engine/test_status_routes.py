# SPDX-License-Identifier: Apache-2.0
"""The status routes by themselves: who may read them, and what they say where there is nothing."""

from __future__ import annotations

import asyncio
import re
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware
from vllm.plugins.endpoint_plugins.interface import EndpointPlugin

from ems_vllm.engine.status.plugin import StatusPlugin
from ems_vllm.engine.status.source import Source

SETTINGS = {"kv_compression": {"recipe": "ems", "budget": 64, "inspect_requests": 2}}


class Engine:
    """Stands for vLLM's client of one engine, and counts what it is asked."""

    def __init__(self, additional_config: dict[str, Any]) -> None:
        self.vllm_config = SimpleNamespace(
            additional_config=additional_config,
            model_config=SimpleNamespace(served_model_name="m", max_model_len=4096),
        )
        self.engine_core = SimpleNamespace()
        self.asked: list[str] = []

    async def collective_rpc(self, method: str, timeout: float, args: tuple[Any, ...]) -> list[Any]:
        self.asked.append(method)
        await asyncio.sleep(0.01)
        return [None]


def served(engine: Engine | None, *, keys: tuple[str, ...] = ()) -> TestClient:
    app, plugin = FastAPI(), StatusPlugin()
    assert isinstance(plugin, EndpointPlugin)
    if keys:
        app.add_middleware(AuthenticationMiddleware, tokens=list(keys))
    plugin.attach_router(app)
    asyncio.run(plugin.init_state(engine, app.state, SimpleNamespace()))
    return TestClient(app)


PATHS = ("", "/requests", "/requests/a", "/requests/a/layers/0/kv_heads/0")


@pytest.mark.parametrize("path", PATHS)
def test_data_needs_the_servers_api_key(path):
    client = served(Engine({}), keys=("secret",))
    url = f"/v1/kv_compression{path}"
    assert client.get(url).status_code == 401
    assert client.get(url, headers={"Authorization": "Bearer guess"}).status_code == 401
    answer = client.get(url, headers={"Authorization": "Bearer secret"})
    assert answer.status_code == (404 if "/a" in path else 200)


def test_the_page_holds_no_data_and_loads_nothing_from_elsewhere():
    client = served(Engine(SETTINGS), keys=("secret",))
    first, second = client.get("/kv_compression"), client.get("/kv_compression")
    assert first.status_code == 200
    policy = first.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    (nonce,) = set(re.findall(r"'nonce-([\w-]+)'", policy))
    assert first.text.count(f'nonce="{nonce}"') == 2
    assert nonce not in second.text
    assert not re.search(r"(https?:)?//[a-z]", re.sub(r"^\s*//.*", "", first.text, flags=re.M))


def test_a_server_without_compression_says_so_and_its_engine_is_not_asked():
    engine = Engine({})
    client = served(engine)
    assert client.get("/v1/kv_compression").json()["recipe"] == "off"
    assert client.get("/v1/kv_compression/requests").json() == []
    assert engine.asked == []


def test_a_server_without_an_engine_says_so():
    answer = served(None).get("/v1/kv_compression")
    assert answer.status_code == 503


def test_many_readers_share_an_answer():
    engine = Engine(SETTINGS)

    async def read() -> None:
        source = Source(engine)
        await asyncio.gather(*(source.requests() for _ in range(50)))
        await source.request("a", 8)
        await source.request("b", 8)

    asyncio.run(read())
    # All but the first came while it was being answered.
    assert engine.asked == [*["kv_compression_requests"] * 2, *["kv_compression_request"] * 2]
