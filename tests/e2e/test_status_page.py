# SPDX-License-Identifier: Apache-2.0
"""The status page of a live server, and the JSON behind it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from e2e.browser import SIZES, Complaints, chromium, open_page
from e2e.clients import greedy, prompt
from openai import OpenAI

from ems_vllm.eval.server.process import Server

NUM_LAYERS, NUM_HEADS = 4, 4


def get(server: Server, path: str) -> httpx.Response:
    return httpx.get(f"{server.url}/v1/kv_compression{path}", timeout=60)


@pytest.fixture(scope="module")
def asked(server: Server, client: OpenAI, chapter: str) -> str:
    """A server that has answered about a text; that text."""
    client.completions.create(prompt=prompt(800, seed=20), **greedy(server, 4))
    client.completions.create(prompt=chapter[:4000], **greedy(server, 300))
    return chapter[:4000]


def test_status_says_what_runs_and_what_fits(server: Server, asked: str) -> None:
    found = get(server, "").json()
    assert found["recipe"] == "ems"
    assert found["settings"]["budget"] == 128
    assert (found["num_layers"], found["num_layers_compressed"]) == (NUM_LAYERS, NUM_LAYERS)
    assert found["now"]["compactions"] >= 2
    assert found["now"]["blocks"] > found["now"]["blocks_held"]
    lengths = [one["num_tokens"] for one in found["capacity"]]
    assert lengths == sorted(lengths)
    longest = found["capacity"][-1]
    assert longest["compressed_requests"] > 2 * longest["dense_requests"]
    assert longest["dense_blocks"] == -(-longest["num_tokens"] // 16)
    assert found["memory"]["score_bytes"] > 0


def test_a_request_says_where_it_holds_entries(server: Server, asked: str) -> None:
    latest = get(server, "/requests").json()[0]
    assert latest["num_compactions"] == 2
    assert not latest["is_running"]
    found = get(server, f"/requests/{latest['request_id']}?bins=50").json()
    assert len(found["heads"]) == NUM_LAYERS * NUM_HEADS
    assert "".join(found["text"]) == asked
    for head in found["heads"]:
        assert sum(head["counts"]) == found["num_entries"] == latest["num_entries"]
    one = get(server, f"/requests/{latest['request_id']}/layers/2/kv_heads/3").json()
    # Sinks, which ems always keeps, and the budget.
    assert one["positions"][:4] == [0, 1, 2, 3]
    assert len(set(one["positions"])) == len(one["positions"]) == 128


def test_wrong_questions_are_answered_with_what_is_wrong(server: Server, asked: str) -> None:
    known = get(server, "/requests").json()[0]["request_id"]
    assert get(server, "/requests/nobody").status_code == 404
    assert get(server, f"/requests/{known}/layers/99/kv_heads/0").status_code == 404
    for wrong in ("?bins=0", "?bins=1025", "?bins=many"):
        answer = get(server, f"/requests/{known}{wrong}")
        assert answer.status_code == 400
        assert "bins" in answer.text
    assert get(server, "/requests/nobody/layers/-1/kv_heads/0").status_code == 400
    assert get(server, f"/requests/{'x' * 513}").status_code == 400


def test_what_is_refused_and_answered_is_what_the_schema_says(server: Server) -> None:
    schema = httpx.get(f"{server.url}/openapi.json", timeout=60).json()
    routes = {path: of for path, of in schema["paths"].items() if "/v1/kv_compression" in path}
    assert len(routes) == 4
    for of_path in routes.values():
        # Not 422, with which FastAPI answers by itself; vLLM says 400.
        assert (
            {"200", "401", "4XX", "503"}
            <= set(of_path["get"]["responses"])
            <= {*("200", "401", "404", "4XX", "503")}
        )
    for wrong, status in (("?bins=0", 400), ("", 404)):
        error = get(server, f"/requests/nobody{wrong}").json()["error"]
        assert error["code"] == status
        assert error["message"]


@pytest.mark.parametrize("name", ["a/b c", "../../x", '"choices":[],', "\u202e"])
def test_a_client_may_give_a_request_any_name(server: Server, name: str) -> None:
    body = {"model": server.model, "prompt": prompt(400, seed=9), "max_tokens": 2, "stream": True}
    # The name is a part of every event, and the last one is written anew.
    body |= {"request_id": name, "stream_options": {"include_usage": True}}
    answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=300)
    *_, last, done = answer.text.strip().split("\n\n")
    assert done == "data: [DONE]"
    said = json.loads(last.removeprefix("data: "))
    assert said["id"] == f"cmpl-{name}"
    assert said["usage"]["kv_compression"]["compactions"] == 1
    latest = get(server, "/requests").json()[0]
    assert latest["request_id"].startswith(f"cmpl-{name}")
    path = f"/requests/{quote(latest['request_id'], safe='')}"
    assert get(server, path).json()["request_id"] == latest["request_id"]
    one = get(server, f"{path}/layers/0/kv_heads/0").json()
    assert one["request_id"] == latest["request_id"]


def test_names_that_nobody_can_ask_for_are_not_remembered(server: Server) -> None:
    known = get(server, "/requests").json()
    body = {"model": server.model, "prompt": prompt(400, seed=10), "max_tokens": 2}
    body["request_id"] = "n" * 10_000
    assert httpx.post(f"{server.url}/v1/completions", json=body, timeout=300).status_code == 200
    assert get(server, "/requests").json() == known


def test_no_more_requests_are_remembered_than_asked_for(
    server: Server, client: OpenAI, asked: str
) -> None:
    for seed in range(5):
        client.completions.create(prompt=prompt(400 + seed, seed=seed), **greedy(server, 2))
    found = get(server, "/requests").json()
    assert [one["prompt_tokens"] for one in found] == [404, 403, 402, 401]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as running:
        yield running


@pytest.mark.parametrize("size", SIZES)
def test_the_page_shows_a_request_over_its_text(
    server: Server, client: OpenAI, browser: Any, chapter: str, size: str
) -> None:
    client.completions.create(prompt=chapter[:4000], **greedy(server, 4))
    page, complaints = open_page(browser, f"{server.url}/kv_compression", size)
    page.wait_for_selector("#canvas")
    assert "recipe ems" in page.inner_text("#server")
    assert "compactions kept" in page.inner_text("#verdict")
    assert page.locator("#tiles b").count() == 8
    latest = get(server, "/requests").json()[0]
    assert page.inner_text("tr.chosen button") == latest["request_id"]
    # The first bin is a sink's: held by every kv_head, and the text begins there.
    page.focus("#canvas")
    page.keyboard.press("ArrowRight")
    assert page.inner_text("#reading q").strip()
    assert "tokens 0 to" in page.inner_text("#reading p")
    page.select_option("#rows", "heads")
    page.focus("#canvas")
    page.keyboard.press("ArrowRight")
    assert "layer 0, kv_head 0" in page.inner_text("#reading p")
    # Nothing is wider than the screen.
    assert page.evaluate("document.documentElement.scrollWidth") <= SIZES[size][0]
    page.locator("#list button").last.click()
    page.wait_for_selector("#list tr:last-child.chosen")
    assert complaints.found == []
    page.close()


def test_the_strip_is_drawn_as_it_is_held(
    server: Server, client: OpenAI, browser: Any, chapter: str
) -> None:
    client.completions.create(prompt=chapter[:4000], **greedy(server, 4))
    page, _ = open_page(browser, f"{server.url}/kv_compression", "desktop")
    page.wait_for_selector("#canvas")
    # The tail is held by all; much of the rest by nobody.
    greens = page.evaluate(
        """() => {
          const canvas = document.getElementById("canvas"), context = canvas.getContext("2d");
          const row = context.getImageData(0, canvas.height >> 1, canvas.width, 1).data;
          const colour = (_, at) => row.slice(4 * at, 4 * at + 3).join();
          return Array.from({length: canvas.width}, colour);
        }"""
    )
    assert greens[-1] == "0,121,107"
    assert greens.count("238,241,240") > len(greens) / 5
    page.close()


# What ends an element, turns text around, or has no sign.
HOSTILE = '</script><img src=x onerror="window.broken=1"><b>\u202egnitirw\u2066 \x00\u0007&amp;'


def test_the_page_shows_hostile_text_as_text(server: Server, browser: Any) -> None:
    """Names that clients give, and prompts, whatever they hold."""
    name = "</script><b>\u202e" + "n" * 400
    token = "x" * 1_000_000
    bins, text = [0, 1, 2], [HOSTILE, token]
    summary = {
        "request_id": name,
        "prompt_tokens": 2,
        "num_tokens": 2,
        "num_entries": 1,
        "num_compactions": 1,
        "is_running": False,
    }
    detail = {
        **summary,
        "bins": bins,
        "heads": [{"layer": 0, "kv_head": 0, "counts": [1, 0]}],
        "text": text,
    }
    page = browser.new_page(viewport={"width": 390, "height": 844})
    complaints = Complaints(page)
    page.route("**/v1/kv_compression/requests", lambda route: route.fulfill(json=[summary]))
    page.route("**/v1/kv_compression/requests/*", lambda route: route.fulfill(json=detail))
    page.goto(f"{server.url}/kv_compression")
    page.wait_for_selector("#canvas")
    elements = "document.querySelectorAll('main *').length"
    page.focus("#canvas")
    page.keyboard.press("ArrowRight")
    before = page.evaluate(elements)
    assert page.evaluate("document.querySelector('#reading q').textContent") == HOSTILE
    assert page.evaluate("document.querySelector('tr.chosen button').textContent") == name
    assert page.evaluate("document.querySelector('#reading q').children.length") == 0
    # It turns nothing around beside itself.
    for shown in ("#reading q", "tr.chosen button"):
        style = f"getComputedStyle(document.querySelector({shown!r})).unicodeBidi"
        assert page.evaluate(style) == "isolate"
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.querySelector('#reading q').textContent") == token
    assert page.evaluate(elements) == before
    assert page.evaluate("window.broken") is None
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert complaints.found == []
    page.close()
