# SPDX-License-Identifier: Apache-2.0
"""Every `vllm` command and every documented way to an engine takes the settings, or none at all."""

import argparse
import copy
import dataclasses
import importlib.util
import pickle
from collections.abc import Iterator

import pytest
from engine.harness import LLAMA
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.entrypoints.cli import main as cli
from vllm.utils.argparse_utils import FlexibleArgumentParser

from ems_vllm.config import ConfigError

WORKER = "ems_vllm.cpu_platform.worker.TorchCPUWorker"
COMPRESSED_WORKER = "ems_vllm.engine.worker.cpu.CompressedCPUWorker"
FLAGS = {
    "off": ([], WORKER),
    "recipe": (["--kv-compression", "ems"], COMPRESSED_WORKER),
    "vLLM's flag": (
        ["--additional-config", '{"kv_compression": {"recipe": "knorm"}}'],
        COMPRESSED_WORKER,
    ),
}
# vLLM's own, which only a command line that it takes apart itself can fill.
REQUIRED = {"snapshot_dir": "folder", "input_file": "in.jsonl", "output_file": "out.jsonl"}
WITH_ENGINE = {
    "bench latency",
    "bench mm-processor",
    "bench startup",
    "bench throughput",
    "launch render",
    "preload",
    "run-batch",
    "serve",
    "snapshot create",
}
if importlib.util.find_spec("vllm.benchmarks.forward"):
    # As from 0.33 on. It runs batches that no scheduler planned, so a worker that compresses
    # refuses the first of them.
    WITH_ENGINE.add("bench forward")


class Built(Exception):
    """Carries vLLM's parser out of its main function."""


def leaves(
    parser: argparse.ArgumentParser, path: str = ""
) -> Iterator[tuple[str, argparse.Action]]:
    """Parsers of all commands, by the words that lead to them."""
    nested = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    if not nested:
        yield path.strip(), parser
    for action in nested:
        for name, child in action.choices.items():
            yield from leaves(child, f"{path} {name}")


@pytest.fixture(scope="module")
def parsers() -> dict[str, FlexibleArgumentParser]:
    """The parser of every command, as `vllm` builds them."""

    def stop(self: FlexibleArgumentParser) -> None:
        raise Built(self)

    found = {}
    # These two build their arguments only when they are asked for.
    for command in (["snapshot", "create"], ["bench", "sweep"]):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.argv", ["vllm", *command])
            patch.setattr(FlexibleArgumentParser, "parse_args", stop)
            with pytest.raises(Built) as built:
                cli.main()
        for name, parser in leaves(built.value.args[0]):
            if name not in found or name.startswith(command[0]):
                found[name] = parser
    found.pop("bench", None)
    return found


def parse(parser: FlexibleArgumentParser, flags: list[str]) -> argparse.Namespace:
    """Arguments of a command for the test model."""
    argv = []
    for action in parser._actions:
        if action.required and action.option_strings:
            argv += [action.option_strings[-1], REQUIRED[action.dest]]
    args = parser.parse_args([*argv, *flags])
    args.model = args.tokenizer = LLAMA
    return args


def test_every_command_that_starts_an_engine_has_the_flags(parsers):
    takes = {flag: set() for flag in ("--additional-config", "--kv-compression")}
    for name, parser in parsers.items():
        for flag, found in takes.items():
            if flag in parser._option_string_actions:
                found.add(name)
    assert takes["--additional-config"] == takes["--kv-compression"] == WITH_ENGINE


@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("command", sorted(WITH_ENGINE))
def test_arguments_of_a_command_can_be_rebuilt_from_their_fields(parsers, command, flags):
    """As LLM.from_engine_args, processes of their own and vLLM's log of arguments do."""
    argv, _ = FLAGS[flags]
    for cls in (EngineArgs, AsyncEngineArgs):
        args = cls.from_cli_args(parse(parsers[command], argv))
        fields = {field.name for field in dataclasses.fields(cls)}
        assert set(vars(args)) <= fields
        for rebuilt in (
            cls(**vars(args)),
            copy.deepcopy(args),
            dataclasses.replace(args),
            pickle.loads(pickle.dumps(args)),
        ):
            assert rebuilt == args
            assert bool(rebuilt.additional_config) == bool(argv)


@pytest.mark.parametrize("flags", FLAGS)
def test_every_way_to_a_configuration_chooses_the_worker(parsers, flags):
    argv, worker = FLAGS[flags]
    given = EngineArgs.from_cli_args(parse(parsers["bench latency"], argv))
    # LLM.from_engine_args makes new ones from their fields; LLM(...) is the same without a command.
    keywords = vars(given)
    python = {"model": LLAMA, "additional_config": dict(given.additional_config)}
    for args in (given, EngineArgs(**keywords), EngineArgs(**python), AsyncEngineArgs(**python)):
        config = args.create_engine_config()
        assert config.parallel_config.worker_cls == worker
        assert type(config.additional_config) is dict
        # Data-parallel front ends ask the same arguments again.
        assert args.create_engine_config().parallel_config.worker_cls == worker


@pytest.mark.parametrize("rebuilt", [False, True], ids=["as given", "from their fields"])
def test_a_mistake_on_a_command_line_ends_the_command_with_a_sentence(parsers, rebuilt):
    argv = ["--kv-compression", "ems", "--scheduler-cls", "mine.Scheduler"]
    args = EngineArgs.from_cli_args(parse(parsers["bench throughput"], argv))
    if rebuilt:
        args = EngineArgs(**vars(args))
    with pytest.raises(SystemExit, match=r"^vllm: error: scheduler_cls='mine\.Scheduler' cannot"):
        args.create_engine_config()


def test_a_mistake_in_python_is_an_exception_to_handle():
    settings = {"kv_compression": {"recipe": "ems"}}
    args = EngineArgs(LLAMA, scheduler_cls="mine.Scheduler", additional_config=settings)
    with pytest.raises(ConfigError, match=r"scheduler_cls='mine\.Scheduler' cannot"):
        args.create_engine_config()
