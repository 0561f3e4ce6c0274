# SPDX-License-Identifier: Apache-2.0
"""Loading the plugin never keeps vLLM from starting; a wish for compression is then refused."""

import functools
import inspect
import logging
import re
from types import SimpleNamespace
from typing import Any

import pytest
from engine.harness import LLAMA
from vllm.engine.arg_utils import EngineArgs
from vllm.plugins import load_general_plugins
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.executor.abstract import Executor

from ems_vllm import plugin
from ems_vllm.patches import catalogue

SETTINGS = {"kv_compression": {"recipe": "ems"}}


@pytest.fixture(autouse=True)
def _put_back(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Every test starts with vLLM's own functions, and leaves things as they were."""
    # vLLM's loggers do not propagate once it has set them up, and other tests make them quiet.
    caplog.set_level(logging.WARNING, logger="vllm.ems")
    monkeypatch.setattr(logging.getLogger("vllm.ems"), "handlers", [caplog.handler])
    # Loaded within a test, it would be undone with the test and never loaded again.
    load_general_plugins()
    for owner, name in (
        (EngineArgs, "add_cli_args"),
        (EngineArgs, "from_cli_args"),
        (EngineArgs, "create_engine_config"),
        (Executor, "__init__"),
    ):
        raw = owner.__dict__[name]
        kind = type(raw) if isinstance(raw, staticmethod | classmethod) else (lambda fn: fn)
        original = inspect.unwrap(getattr(raw, "__func__", raw))
        monkeypatch.setattr(owner, name, kind(original))


def assert_only_compression_is_refused(message: str, capsys: Any) -> None:
    with pytest.raises(RuntimeError, match=message):
        EngineArgs(LLAMA, additional_config=SETTINGS).create_engine_config()
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    with pytest.raises(SystemExit):
        parser.parse_args(["--kv-compression", "ems"])
    assert re.search(message, capsys.readouterr().err)
    args = EngineArgs.from_cli_args(parser.parse_args(["--model", LLAMA]))
    config = args.create_engine_config()
    config.additional_config = SETTINGS
    with pytest.raises(RuntimeError, match=message):
        Executor.get_class(config)(config)


def test_function_that_somebody_has_replaced(capsys, caplog):
    raw = EngineArgs.__dict__["from_cli_args"]
    EngineArgs.from_cli_args = classmethod(functools.partial(raw.__func__))
    plugin.register()
    assert_only_compression_is_refused("another extension has replaced it", capsys)
    assert "another extension has replaced it" in caplog.text


@pytest.mark.parametrize("error", [OSError("gone"), TypeError("odd"), ValueError("InvalidVersion")])
def test_anything_unforeseen(error, monkeypatch, capsys, caplog):
    def fail(*_):
        raise error

    monkeypatch.setattr(catalogue, "ALWAYS", (SimpleNamespace(verify=fail),))
    plugin.register()
    assert_only_compression_is_refused(r"ems-vllm failed with \w+Error\(", capsys)
    assert str(error) in caplog.text


def test_vllm_without_any_of_the_functions(monkeypatch, caplog):
    monkeypatch.delattr(EngineArgs, "create_engine_config")
    monkeypatch.delattr(EngineArgs, "add_cli_args")
    with caplog.at_level(logging.WARNING):
        plugin.register()
    assert "has no vllm.engine.arg_utils:EngineArgs.add_cli_args" in caplog.text
