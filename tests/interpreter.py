# SPDX-License-Identifier: Apache-2.0
"""How tests run Triton kernels without a GPU: in a process of their own, through its interpreter.

Triton is not among the requirements of a machine without a GPU, because vLLM changes its defaults
where it finds it. `make` installs it into a folder that only these processes see.
"""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / ".triton"


def environment(model_runner: int = 2) -> dict[str, str]:
    """Environment of a process that runs vLLM's kernels through the interpreter.

    Args:
        model_runner: Version of vLLM's model runner, 1 or 2.
    """
    if not FOLDER.is_dir():
        pytest.skip("Triton's interpreter is not installed: run `make .triton`")
    return os.environ | {
        # This package before one that is installed from elsewhere.
        "PYTHONPATH": os.pathsep.join([str(FOLDER), str(ROOT)]),
        "TRITON_INTERPRET": "1",
        # Empty rather than unset: vLLM then keeps Triton although it finds no driver.
        "CUDA_VISIBLE_DEVICES": "",
        "VLLM_USE_V2_MODEL_RUNNER": str(model_runner - 1),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
