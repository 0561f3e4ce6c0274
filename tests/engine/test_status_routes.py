# SPDX-License-Identifier: Apache-2.0
"""The status routes by themselves: who may read them, and what they say where there is nothing."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote

import pytest
from fastapi import FastAPI, HTTPException
from fastapi.testclient import TestClient
from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware
from vllm.plugins.endpoint_plugins.interface import EndpointPlugin

from ems_vllm.engine.status import source as source_module
from ems_vllm.engine.status.plugin import StatusPlugin
from ems_vllm.engine.status.source import MOST_WAITING, Source

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
        self.may_answer = asyncio.Event()
        self.may_answer.set()

    async def collective_rpc(self, method: str, timeout: None, args: tuple[Any, ...]) -> list[Any]:
        # vLLM's workers take an answer that came too late for one call to another one.
        assert timeout is None
        self.asked.append(method)
        await self.may_answer.wait()
        return [None]


def served(
    engine: Engine | None,
    *,
    keys: tuple[str, ...] = (),
    origins: tuple[str, ...] = ("*",),
    root_path: str = "",
) -> TestClient:
    app, plugin = FastAPI(root_path=root_path), StatusPlugin()
    assert isinstance(plugin, EndpointPlugin)
    if keys:
        app.add_middleware(AuthenticationMiddleware, tokens=list(keys))
    plugin.attach_router(app)
    args = SimpleNamespace(api_key=list(keys), allowed_origins=list(origins))
    asyncio.run(plugin.init_state(engine, app.state, args))
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


@pytest.mark.parametrize("path", PATHS)
def test_pages_of_other_sites_may_not_read(path):
    """Whatever vLLM lets in: a browser in the server's network may open any site."""
    client = served(Engine({}), origins=("*", "https://board.example"))
    url = f"/v1/kv_compression{path}"
    for site in ("https://evil.example", "null", "http://[", "http://testserver.evil.example"):
        assert client.get(url, headers={"Origin": site}).status_code == 403
    for site in ("http://testserver", "https://board.example"):
        assert client.get(url, headers={"Origin": site}).status_code != 403


def test_nothing_is_kept_or_shown_by_others():
    client = served(Engine(SETTINGS))
    for path in ("/kv_compression", "/v1/kv_compression/requests"):
        headers = client.get(path).headers
        assert headers["Cache-Control"] == "no-store"
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
    assert headers["Content-Type"] == "application/json"
    page = client.get("/kv_compression").headers
    assert page["X-Frame-Options"] == "DENY"
    assert "frame-ancestors 'none'" in page["Content-Security-Policy"]


def test_they_are_read_and_nothing_else():
    client = served(Engine(SETTINGS))
    for path in ("/kv_compression", *(f"/v1/kv_compression{path}" for path in PATHS)):
        for method in ("POST", "PUT", "PATCH", "DELETE", "HEAD"):
            answer = client.request(method, path)
            assert (answer.status_code, answer.headers["Allow"]) == (405, "GET")


@pytest.mark.parametrize("prefix", ["", "/behind/a/proxy"])
def test_a_proxy_may_put_them_below_a_prefix(prefix):
    """One that strips it, and one that does not."""
    client = served(Engine(SETTINGS), keys=("secret",), root_path=prefix)
    key = {"Authorization": "Bearer secret"}
    for root in {"", prefix}:
        assert client.get(f"{root}/kv_compression").status_code == 200
        for slash in ("", "/"):
            url = f"{root}/v1/kv_compression{slash}"
            assert client.get(url).status_code == 401
        assert client.get(f"{root}/v1/kv_compression/requests", headers=key).json() == []


@pytest.mark.parametrize(
    "name", ["a/b", "../../x", "a/layers/0/kv_heads/0", "a\n", "\n/", "\u202e", '"<']
)
def test_a_request_of_any_name_can_be_asked_for(name):
    engine = Engine(SETTINGS)
    path = f"/v1/kv_compression/requests/{quote(name, safe='')}"
    message = f"Nothing is remembered of request_id={name!r}."
    for url in (path, f"{path}/layers/1/kv_heads/2"):
        answer = served(engine).get(url)
        assert answer.status_code == 404
        if "layers" not in name:
            assert answer.json() == {"detail": message}


def test_prompts_are_not_shown_without_a_key_unsaid(caplog):
    caplog.set_level("WARNING", "vllm.ems")
    logging.getLogger("vllm.ems").addHandler(caplog.handler)
    settings = {"kv_compression": {**SETTINGS["kv_compression"], "inspect_text": True}}
    served(Engine(settings), keys=("secret",))
    served(Engine(SETTINGS))
    assert caplog.records == []
    served(Engine(settings))
    assert "inspect_text=True on a server without --api-key" in caplog.text


def test_many_readers_share_an_answer():
    engine = Engine(SETTINGS)

    async def read() -> None:
        source = Source(engine)
        await asyncio.gather(*(source.requests() for _ in range(50)))
        engine.may_answer.clear()
        first = asyncio.create_task(source.requests())
        await until(lambda: len(engine.asked) == 2)
        # What is being answered was put before these came.
        others = [asyncio.create_task(source.requests()) for _ in range(50)]
        await asyncio.sleep(0)
        engine.may_answer.set()
        await asyncio.gather(first, *others)
        await source.request("a", 8)
        await source.request("b", 8)

    asyncio.run(read())
    assert engine.asked == [*["kv_compression_requests"] * 3, *["kv_compression_request"] * 2]


def test_readers_do_not_pile_up_before_a_busy_engine(monkeypatch):
    engine = Engine(SETTINGS)
    monkeypatch.setattr(source_module, "_PAUSE_S", 0)

    async def read() -> None:
        engine.may_answer.clear()
        source = Source(engine)
        first = asyncio.create_task(source.requests())
        await until(lambda: engine.asked)
        waiting = [asyncio.create_task(source.request("a", 1 + at)) for at in range(MOST_WAITING)]
        await asyncio.sleep(0)
        with pytest.raises(HTTPException) as refusal:
            await source.request("a", 1000)
        assert refusal.value.status_code == 503
        # Readers that have gone leave their questions, and others can still ask the same.
        for reader in waiting[:10]:
            reader.cancel()
        waiting.append(asyncio.create_task(source.request("a", 1)))
        await asyncio.sleep(0)
        engine.may_answer.set()
        await asyncio.gather(first, *waiting, return_exceptions=True)
        assert waiting[-1].result() is None
        assert await source.request("a", 1000) is None

    asyncio.run(read())
    assert len(engine.asked) == 1 + MOST_WAITING + 1


def test_an_engine_that_does_not_answer_is_not_waited_for_and_not_given_up(monkeypatch):
    engine = Engine(SETTINGS)
    monkeypatch.setattr(source_module, "_TIMEOUT_S", 0.01)

    async def read() -> None:
        engine.may_answer.clear()
        source = Source(engine)
        for _ in range(2):
            with pytest.raises(HTTPException) as refusal:
                await source.requests()
            assert refusal.value.status_code == 503
        # Its answer to the first question is still waited for.
        assert engine.asked == ["kv_compression_requests"]
        engine.may_answer.set()
        monkeypatch.setattr(source_module, "_TIMEOUT_S", 60)
        assert await source.requests() == []

    asyncio.run(read())
    assert len(engine.asked) == 2


async def until(happened: Callable[[], object]) -> None:
    while not happened():
        await asyncio.sleep(0)
