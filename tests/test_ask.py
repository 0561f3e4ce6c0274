# SPDX-License-Identifier: Apache-2.0
"""The question that `make serve` suggests: both answers, and what the cache held."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import ask
import pytest

POOL = (
    'vllm:cache_config_info{num_gpu_blocks="101"} 1.0\n'
    "vllm:num_requests_running 1.0\n"
    "vllm:num_requests_waiting 0.0\n"
    "vllm:num_preemptions_total 0.0\n"
    "vllm:generation_tokens_total 0.0\n"
)


class Handler(BaseHTTPRequestHandler):
    """Holds 80 blocks for a full cache and 30 for a compressed one, and none after the answer."""

    bodies: list[dict[str, Any]]
    readings: list[float]

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            self._send("application/json", json.dumps({"data": [{"id": "tiny"}]}))
        else:
            usage = self.readings.pop(0)
            self._send("text/plain", f"{POOL}vllm:kv_cache_usage_perc {usage}\n")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.bodies.append(body)
        full = body["vllm_xargs"].get("kv_compression") == "off"
        self.readings[:] = [0.8 if full else 0.3, 0.0]
        word = "1884" if full else "1885"
        events: list[dict[str, Any]] = [
            {"choices": [{"index": 0, "delta": {"content": word}}]},
            {"choices": [], "usage": {"prompt_tokens": 1270, "completion_tokens": 1,
                                      "total_tokens": 1271}},
        ]  # fmt: skip
        lines = [f"data: {json.dumps(event)}\n\n" for event in events]
        self._send("text/event-stream", "".join(lines) + "data: [DONE]\n\n")

    def _send(self, kind: str, text: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())


@pytest.fixture
def url() -> Iterator[str]:
    Handler.bodies, Handler.readings = [], []
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["ask.py", *arguments])
    return ask.main()


def test_asks_about_the_first_chapter_with_both_caches(
    url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "Which year?", "--url", url, "--budget", "256") == 0
    said = capsys.readouterr().out
    assert "1884\n              1,271 tokens in 80 blocks" in said
    assert "1885\n              1,271 tokens in 30 blocks" in said
    full, compressed = Handler.bodies
    assert full["messages"] == compressed["messages"]
    assert full["vllm_xargs"] == {"kv_compression": "off"}
    assert compressed["vllm_xargs"] == {"kv_budget": 256}
    prompt = full["messages"][0]["content"]
    assert "Penang lawyer" in prompt
    assert prompt.endswith("Question: Which year?")
    assert "Curse of the Baskervilles" not in prompt


def test_no_server_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "--url", "http://127.0.0.1:9") == 1
    assert capsys.readouterr().err == (
        "No server answers at http://127.0.0.1:9: start one with `make serve`.\n"
    )
