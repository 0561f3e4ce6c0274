# SPDX-License-Identifier: Apache-2.0
"""A server whose model is split between two nodes, here of one machine: as one process."""

import os
import signal
import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from e2e.clients import client_of, greedy, prompt
from e2e.conftest import StartServer
from processes import fork

from ems_vllm.eval.server.process import Server

COMPRESSION = ("--kv-compression", "ems", "--kv-compression-config", '{"budget": 128}')


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def leader(models: Path, start_server: StartServer, tmp_path_factory) -> Iterator[Server]:
    """As deploy/kubernetes/leader-worker has it: the second node without HTTP."""
    nodes = ("--pipeline-parallel-size=2", "--nnodes=2", "--master-addr=localhost")
    flags = (*COMPRESSION, *nodes, f"--master-port={free_port()}")
    log = tmp_path_factory.mktemp("worker") / "log.txt"
    arguments = ["vllm", "serve", str(models / "random-llama"), *flags]
    worker = fork([*arguments, "--node-rank=1", "--headless"], log, log)
    try:
        with start_server("random-llama", *flags, "--node-rank=0") as running:
            yield running
    finally:
        with suppress(ProcessLookupError):
            os.killpg(worker.pid, signal.SIGKILL)
        worker.wait()


@pytest.mark.parametrize("length", [100, 1200])
def test_answers_are_those_of_one_process(server: Server, leader: Server, length: int) -> None:
    tokens = prompt(length, seed=length)
    one, two = (
        client_of(where).completions.create(prompt=tokens, **greedy(where, 60))
        for where in (server, leader)
    )
    assert two.choices[0].text == one.choices[0].text
    assert two.usage is not None
    assert one.usage is not None
    held = two.usage.model_extra["kv_compression"]
    assert held == one.usage.model_extra["kv_compression"]
    assert (held["compactions"] > 0) == (length > 1000)
