# SPDX-License-Identifier: Apache-2.0
"""What a GPU machine is and has, asked in processes of their own: any of it may be missing."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PACKED = ROOT / ".gpu"

_ASK_TORCH = """
import json, platform
from importlib import metadata
def version(name):
    try: return metadata.version(name)
    except metadata.PackageNotFoundError: return None
found = {name: version(name) for name in ("torch", "triton", "vllm", "transformers")}
found["python"] = platform.python_version()
try:
    import torch
    found["torch_cuda"] = torch.version.cuda
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        found.update(gpu=gpu.name, capability=[gpu.major, gpu.minor],
                     multiprocessors=gpu.multi_processor_count, memory_bytes=gpu.total_memory,
                     l2_bytes=gpu.L2_cache_size)
except ImportError:
    pass
print(json.dumps(found))
"""


def describe(python: str, env: Mapping[str, str]) -> dict[str, Any]:
    """GPU, driver, versions and commit; None for what is not there."""
    found: dict[str, Any] = {"commit": commit(), "gpu": None, "capability": None}
    answer = _output([python, "-c", _ASK_TORCH], env)
    if answer:
        found.update(json.loads(answer.splitlines()[-1]))
    found["driver"] = _output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
    release = re.search(r"V([\d.]+)", _output(["nvcc", "--version"], env) or "")
    found["nvcc"] = release[1] if release else None
    return found


def arch_of(capability: list[int]) -> str:
    """The GPU's architecture in torch's notation, with the features that only it has."""
    major, minor = capability
    return f"{major}.{minor}" + ("a" if major >= 9 else "")


def commit() -> str | None:
    """Of the checkout, "-dirty" if it differs; without git, what `make gpu-pack` noted."""
    found = _output(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"])
    if found is None:
        noted = PACKED / "commit"
        return noted.read_text().strip() if noted.is_file() else None
    changed = _output(["git", "-C", str(ROOT), "status", "--porcelain", "csrc", "ems_vllm"])
    return f"{found}-dirty" if changed else found


def tool(name: str) -> str | None:
    """Where a program is: on the path, or where CUDA puts it."""
    return shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin")


def _output(command: list[str], env: Mapping[str, str] | None = None) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=env)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
