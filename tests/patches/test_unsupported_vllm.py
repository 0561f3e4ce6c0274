# SPDX-License-Identifier: Apache-2.0
"""A vLLM that this package was not written for: it runs as ever, compression is refused."""

import pytest
from engine.harness import LLAMA
from processes import run_script

# In a process of its own, in which vLLM has another version from the start.
_SCRIPT = """
import contextlib, io, json, sys
import vllm
case = json.loads(sys.argv[1])
vllm.__version__ = case["version"]
from vllm.plugins import load_general_plugins
load_general_plugins()
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

error = io.StringIO()
try:
    with contextlib.redirect_stderr(error):
        parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
        args = EngineArgs.from_cli_args(parser.parse_args(case["argv"]))
    args.additional_config = case["additional_config"]
    config = args.create_engine_config()
    answer = config.parallel_config.worker_cls
except SystemExit:
    answer = error.getvalue()
except RuntimeError as error:
    answer = str(error)
print(json.dumps(answer.strip().splitlines()[-1]))
"""
MODEL = ["--model", LLAMA]
COMPRESSED = {"kv_compression": {"recipe": "ems"}}


@pytest.mark.parametrize(
    ("argv", "additional_config"),
    [
        ([*MODEL, "--kv-compression", "ems"], {}),
        ([*MODEL, "--kv-compression-config", "{}"], {}),
        (MODEL, COMPRESSED),
    ],
    ids=["flag", "settings", "python"],
)
def test_compression_is_refused_with_what_to_do(argv, additional_config):
    case = {"version": "0.99.0", "argv": argv, "additional_config": additional_config}
    sentence = run_script(_SCRIPT, case)
    assert "vllm==0.99.0 is not supported" in sentence
    assert "install one of those versions, or a newer ems-vllm" in sentence


def test_vllm_alone_runs_as_ever():
    case = {"version": "0.99.0", "argv": MODEL, "additional_config": {"of_others": 1}}
    assert run_script(_SCRIPT, case) == "ems_vllm.platform.worker.ReferenceCPUWorker"


def test_the_installed_vllm_is_supported():
    """The control: the same script with the version that is there."""
    case = {"version": "0.32.0", "argv": MODEL, "additional_config": COMPRESSED}
    assert run_script(_SCRIPT, case) == "ems_vllm.engine.workers.cpu.CompressedCPUWorker"
