# SPDX-License-Identifier: Apache-2.0
"""Servers by the command that users give, and their logs where a test fails."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from openai import OpenAI
from processes import Fork, fork

from ems_vllm.eval.server.process import Server
from ems_vllm.keys import STATUS_PLUGIN

ROOT = Path(__file__).resolve().parents[2]
MODELS = ("random-llama", "random-qwen3")
# The status page is there, too.
WITH_PAGE = {"VLLM_PLUGINS": f"ems_cpu,ems_vllm,{STATUS_PLUGIN}"}
StartServer = Callable[..., AbstractContextManager[Server]]


class ForkedServer(Server):
    """The serving benchmark's launcher, without the imports of each process."""

    @staticmethod
    def _start(command: list[str], log_path: Path) -> Fork:
        return fork(["vllm", *command[1:]], log_path, log_path, variables=WITH_PAGE)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.e2e)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Add the log of every server that a failed test used."""
    report = yield
    if report.failed:
        for name, value in getattr(item, "funcargs", {}).items():
            if isinstance(value, Server):
                report.sections.append((f"log of {name}", value.log_tail()))
    return report


@pytest.fixture(scope="session")
def models() -> Path:
    """Folder of the models, the random ones made on first use."""
    folder = ROOT / "models"
    if not all((folder / name / "config.json").is_file() for name in MODELS):
        subprocess.run([sys.executable, str(folder / "make_random.py")], check=True)
    return folder


@pytest.fixture(scope="session")
def start_server(models: Path, tmp_path_factory: pytest.TempPathFactory) -> StartServer:
    """Starts `vllm serve models/MODEL ARGS...`, for the length of a `with`."""

    def start(model: str, *args: str) -> Server:
        log = tmp_path_factory.mktemp("server") / "log.txt"
        return ForkedServer(str(models / model), args, log)

    return start


@pytest.fixture(scope="session")
def server(start_server: StartServer) -> Iterator[Server]:
    """A compressing server with room for everything, shared by all modules."""
    settings = (
        '{"budget": 128, "inspect_requests": 4, "inspect_text": true, "guard_share": 1.0, '
        '"guard_limit": 0.0001, "guard_action": "report"}'
    )
    args = ("--kv-compression", "ems", "--kv-compression-config", settings)
    with start_server("random-llama", *args) as running:
        yield running


@pytest.fixture(scope="session")
def client(server: Server) -> OpenAI:
    from e2e.clients import client_of

    return client_of(server)


@pytest.fixture(scope="session")
def chapter(models: Path) -> str:
    """Real text of many thousand tokens."""
    return next((models / "text").glob("*.txt")).read_text()
