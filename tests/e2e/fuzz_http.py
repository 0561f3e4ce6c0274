# SPDX-License-Identifier: Apache-2.0
"""Sends a server what clients should not, and sees whether it refuses, lives on and still answers.

    make fuzz EXAMPLES=200 FUZZ_ARGS="--seed 1"

Three parts, against a server that it starts on this machine: this package's routes by their schema,
with every check of Schemathesis; completions and chats with hostile `vllm_xargs` (fuzz_hooks.py);
and the bodies below, which are as large and as deep as what was found to cost most.
Before and after, the same question must have the same answer.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ems_vllm.eval.server.process import Server
from ems_vllm.keys import STATUS_PLUGIN

HERE = Path(__file__).resolve().parent
SETTINGS = {"budget": 128, "inspect_requests": 4, "inspect_text": True}
PATHS = ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages")
# Long enough to be compressed.
PROMPT = list(range(300, 700))
OURS = "kv_compression"
COMPLETIONS = "^/v1/(chat/)?completions$"


def main() -> int:
    """Exit status: 0 where nothing was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--schemathesis", required=True, type=Path, help="its command")
    parser.add_argument("--model", default="models/random-llama")
    parser.add_argument("--examples", type=int, default=200, help="of each route")
    parser.add_argument("--seed", type=int)
    args = parser.parse_args()
    os.environ["VLLM_PLUGINS"] = f"ems_cpu,ems_vllm,{STATUS_PLUGIN}"
    log = Path(tempfile.mkdtemp()) / "server.txt"
    flags = ("--kv-compression", "ems", "--kv-compression-config", json.dumps(SETTINGS))
    with Server(args.model, flags, log) as server:
        expected = answer(server)
        failures = [
            *schemathesis(server, args, OURS, "all", "coverage,fuzzing"),
            *schemathesis(server, args, OURS, "all", "fuzzing", names_known=True),
            *schemathesis(
                server, args, COMPLETIONS, "not_a_server_error,answered_or_refused", "fuzzing"
            ),
            *hostile_bodies(server),
        ]
        if not server.is_alive():
            failures.append("the server has ended")
        elif (found := answer(server)) != expected:
            failures.append(f"the answer was {expected!r}, and is {found!r}")
        # vLLM's API server logs those of some errors 400, too.
        if any("EngineCore" in line and "Traceback" in line for line in server.log().splitlines()):
            failures.append("the log has a traceback of the engine")
    for failure in failures:
        print(f"FAILED: {failure}")
    print(f"log of the server: {log}")
    return bool(failures)


def schemathesis(
    server: Server,
    args: argparse.Namespace,
    routes: str,
    checks: str,
    phases: str,
    names_known: bool = False,
) -> Iterator[str]:
    """What it fails with, if it does; it prints what it finds itself.

    Args:
        routes, checks, phases: As it has them; a regular expression and lists with commas.
        names_known: Whether it asks for requests that are remembered, rightly; or for any, wrongly
            as well.
    """
    environment = {
        **os.environ,
        "FUZZ_URL": server.url,
        "FUZZ_MODEL": server.model,
        "SCHEMATHESIS_HOOKS": "fuzz_hooks",
        "PYTHONPATH": str(HERE),
    }
    command = [str(args.schemathesis.absolute()), "run", f"{server.url}/openapi.json"]
    command += ["--include-path-regex", routes, "--checks", checks, "--phases", phases]
    command += ["--max-examples", str(args.examples), "--continue-on-failure"]
    if names_known:
        environment["FUZZ_NAMES_KNOWN"] = "1"
        command += ["--mode", "positive"]
    if args.seed is not None:
        command += ["--seed", str(args.seed)]
    # Elsewhere: it keeps notes in the folder in which it runs.
    with tempfile.TemporaryDirectory() as folder:
        if subprocess.run(command, env=environment, cwd=folder, check=False).returncode:
            yield f"Schemathesis on {routes}"


def hostile_bodies(server: Server) -> Iterator[str]:
    """What is wrong with answers to bodies that no schema suggests."""
    deep = "[" * 900 + "1" + "]" * 900
    for name, xargs in {
        "100,000 keys": json.dumps({f"{at:012d}": 1 for at in range(100_000)}),
        "100,000 ranges": json.dumps(
            {"kv_protect": [f"{2 * at}-{2 * at + 1}" for at in range(10**5)]}
        ),
        "1,000,000 times a range": json.dumps({"kv_protect": ["0-1"] * 10**6}),
        "a text of 5 MB": json.dumps({"kv_protect": ["x" * 5_000_000]}),
        "a key of 5 MB": json.dumps({"x" * 5_000_000: 1}),
        "900 levels": f'{{"kv_budget": {deep}}}',
        "5,000 digits": f'{{"kv_budget": {"9" * 5000}}}',
        "NaN": '{"kv_ratio": NaN}',
        "halves of characters": '{"kv_protect": ["\\ud800"], "kv_\\udfff": "\\ud800"}',
    }.items():
        for path in PATHS:
            start = time.monotonic()
            status, size = post(server, path, body_of(server, path, xargs))
            print(f"{name}, {path}: HTTP {status}, {size} bytes, {time.monotonic() - start:.2f} s")
            if status != 400 and (status != 200 or name != "a key of 5 MB"):
                yield f"{name} on {path}: HTTP {status}"
            if status == 400 and size > 20_000:
                yield f"{name} on {path}: an error of {size} bytes"


def body_of(server: Server, path: str, xargs: str) -> bytes:
    chat = [{"role": "user", "content": "Hello"}]
    prompts: dict[str, dict[str, Any]] = {
        "/v1/completions": {"prompt": PROMPT, "max_tokens": 2},
        "/v1/responses": {"input": "Hello", "max_output_tokens": 2},
    }
    prompt = prompts.get(path, {"messages": chat, "max_tokens": 2})
    known = json.dumps({"model": server.model, **prompt})
    return f'{known[:-1]}, "vllm_xargs": {xargs}}}'.encode()


def post(server: Server, path: str, body: bytes) -> tuple[int, int]:
    """HTTP status, and bytes of the answer."""
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(server.url + path, body, headers)
    try:
        with urllib.request.urlopen(request, timeout=300) as found:
            return found.status, len(found.read())
    except urllib.error.HTTPError as error:
        return error.code, len(error.read())


def answer(server: Server) -> str:
    """Of a greedy request that is compressed, and that the prefix cache does not know."""
    body = {"model": server.model, "prompt": PROMPT, "max_tokens": 16, "temperature": 0}
    body["cache_salt"] = str(time.monotonic_ns())
    headers = {"Content-Type": "application/json"}
    url = f"{server.url}/v1/completions"
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=300) as found:
        said = json.load(found)
    assert said["usage"]["kv_compression"]["compactions"], said
    return str(said["choices"][0]["text"])


if __name__ == "__main__":
    sys.exit(main())
