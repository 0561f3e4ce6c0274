# SPDX-License-Identifier: Apache-2.0
"""A vLLM that this package was not written for: it runs as ever, compression is refused."""

from importlib import metadata

import pytest
from engine.harness import LLAMA
from processes import run_script

pytestmark = pytest.mark.slow

# In a process of its own, in which vLLM has another version from the start. For every case: the
# worker that would run, or the last line of what the operator is told.
_SCRIPT = """
import contextlib, io, json, sys
import vllm
given = json.loads(sys.argv[1])
vllm.__version__ = given["version"]
from vllm.plugins import load_general_plugins
load_general_plugins()
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

def answer(argv, additional_config):
    error = io.StringIO()
    try:
        with contextlib.redirect_stderr(error):
            parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
            args = EngineArgs.from_cli_args(parser.parse_args(argv))
        args.additional_config = additional_config
        return args.create_engine_config().parallel_config.worker_cls
    except SystemExit:
        return error.getvalue().strip().splitlines()[-1]
    except RuntimeError as error:
        return str(error)

print(json.dumps({name: answer(*case) for name, case in given["cases"].items()}))
"""
MODEL = ["--model", LLAMA]
CASES = {
    "flag": ([*MODEL, "--kv-compression", "ems"], {}),
    "settings": ([*MODEL, "--kv-compression-config", "{}"], {}),
    "python": (MODEL, {"kv_compression": {"recipe": "ems"}}),
    "neither": (MODEL, {"of_others": 1}),
}


@pytest.fixture(scope="module")
def answers():
    return run_script(_SCRIPT, {"version": "0.99.0", "cases": CASES})


@pytest.mark.parametrize("name", ["flag", "settings", "python"])
def test_compression_is_refused_with_what_to_do(answers, name):
    assert "vllm==0.99.0 is not supported" in answers[name]
    assert "install one of those versions, or a newer ems-vllm" in answers[name]


def test_vllm_alone_runs_as_ever(answers):
    assert answers["neither"] == "ems_vllm.cpu_platform.worker.TorchCPUWorker"


def test_the_installed_vllm_is_supported():
    """The control: the same script with the version that is there."""
    cases = {name: CASES[name] for name in ("python", "neither")}
    assert run_script(_SCRIPT, {"version": metadata.version("vllm"), "cases": cases}) == {
        "python": "ems_vllm.engine.worker.cpu.CompressedCPUWorker",
        "neither": "ems_vllm.cpu_platform.worker.TorchCPUWorker",
    }
