# SPDX-License-Identifier: Apache-2.0
"""An OpenAI endpoint that answers what a test says, and remembers what it was asked."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

METRICS = (
    'vllm:cache_config_info{num_gpu_blocks="101"} 1.0\n'
    "vllm:kv_cache_usage_perc 0.25\n"
    "vllm:num_requests_running 1.0\n"
    "vllm:num_requests_waiting 0.0\n"
    "vllm:num_preemptions_total 0.0\n"
    "vllm:generation_tokens_total 0.0\n"
)


class Refusal(Exception):
    """What a request is refused with.

    Args:
        status: HTTP status.
        message: Of the error.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class FakeServer:
    """Serves while its context is open.

    Args:
        answer: From a request's body to the text; may raise Refusal.
        is_vllm: Whether it says so.

    Attributes:
        requests: Bodies, in order of arrival.
    """

    def __init__(self, answer: Callable[[dict[str, Any]], str], is_vllm: bool = True) -> None:
        self.requests: list[dict[str, Any]] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, format: str, *args: object) -> None:
                pass

            def do_GET(self) -> None:
                if self.path == "/version" and is_vllm:
                    self._send(200, {"version": "0"})
                elif self.path == "/metrics" and is_vllm:
                    self._write(200, METRICS.encode(), "text/plain")
                else:
                    self._send(200 if self.path == "/v1/models" else 404, {})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server.requests.append(body)
                try:
                    text = answer(body)
                except Refusal as refusal:
                    message = {"message": str(refusal), "type": "refused"}
                    self._send(refusal.status, {"error": message})
                    return
                usage = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
                is_chat = "messages" in body
                choice = {"delta": {"content": text}} if is_chat else {"text": text}
                common = {"id": "x", "created": 0, "model": "m", "object": "text_completion"}
                if not body.get("stream"):
                    whole = {"index": 0, "finish_reason": "stop", "text": text}
                    self._send(200, {**common, "choices": [whole], "usage": usage})
                    return
                chunks = [
                    {**common, "choices": [{"index": 0, "finish_reason": "stop", **choice}]},
                    {**common, "choices": [], "usage": usage},
                ]
                lines = [f"data: {json.dumps(chunk)}\n\n" for chunk in chunks]
                self._write(
                    200, "".join([*lines, "data: [DONE]\n\n"]).encode(), "text/event-stream"
                )

            def _send(self, status: int, data: object) -> None:
                self._write(status, json.dumps(data).encode(), "application/json")

            def _write(self, status: int, content: bytes, kind: str) -> None:
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> FakeServer:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
