# SPDX-License-Identifier: Apache-2.0
"""The status page of a live server, and the JSON behind it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from e2e.browser import SIZES, chromium, open_page
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
