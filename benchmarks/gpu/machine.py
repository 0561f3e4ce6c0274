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

_ASK_VERSIONS = """
import json, platform
from importlib import metadata
def version(name):
    try: return metadata.version(name)
    except metadata.PackageNotFoundError: return None
found = {name: version(name) for name in ("torch", "triton", "vllm", "transformers")}
found["python"] = platform.python_version()
print(json.dumps(found))
"""
_ASK_TORCH = """
import json, torch
found = {"torch_cuda": torch.version.cuda}
if torch.cuda.is_available():
    gpu = torch.cuda.get_device_properties(0)
    found.update(gpu=gpu.name, capability=[gpu.major, gpu.minor],
                 multiprocessors=gpu.multi_processor_count, memory_bytes=gpu.total_memory,
                 l2_bytes=gpu.L2_cache_size)
print(json.dumps(found))
"""
# Torch may have to be read from a cold disk.
_TORCH_S = 60
_TOOL_S = 15


def describe(python: str, env: Mapping[str, str]) -> dict[str, Any]:
    """GPU, driver, versions and commit; None for what is not there, or does not answer in time."""
    found: dict[str, Any] = {"commit": commit(), "gpu": None, "capability": None, "driver": None}
    found |= _nvidia_smi() | versions(python, env)
    found |= _answer([python, "-c", _ASK_TORCH], env, _TORCH_S)
    release = re.search(r"V([\d.]+)", _output(["nvcc", "--version"], env) or "")
    found["nvcc"] = release[1] if release else None
    return found


def versions(python: str, env: Mapping[str, str]) -> dict[str, Any]:
    """Of Python and of the packages that matter; asked again after some were installed."""
    return _answer([python, "-c", _ASK_VERSIONS], env, _TOOL_S)


def _nvidia_smi() -> dict[str, Any]:
    """What is known of the GPU also where torch does not come up."""
    query = "--query-gpu=name,compute_cap,driver_version"
    answer = _output(["nvidia-smi", query, "--format=csv,noheader"]) or ""
    match = re.match(r"(.+), (\d+)\.(\d+), ([\d.]+)", answer)
    if match is None:
        return {}
    capability = [int(match[2]), int(match[3])]
    return {"gpu": match[1], "capability": capability, "driver": match[4]}


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


def _answer(command: list[str], env: Mapping[str, str], seconds: float) -> dict[str, Any]:
    """The JSON of a command's last line; empty where there is none."""
    answer = _output(command, env, seconds)
    try:
        return json.loads(answer.splitlines()[-1]) if answer else {}
    except ValueError:
        return {}


def _output(
    command: list[str], env: Mapping[str, str] | None = None, seconds: float = _TOOL_S
) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, env=env)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
