# SPDX-License-Identifier: Apache-2.0
"""Where and with what a measurement was made."""

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path


def describe() -> dict[str, object]:
    """Versions, hardware and commit; no name of the machine, no path."""
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "commit": _commit(),
        "python": platform.python_version(),
        **{name: _version(name) for name in ("ems-vllm", "vllm", "torch")},
        "cpu": _cpu_name(),
        "num_cores": len(os.sched_getaffinity(0)),
        "gpu": gpu,
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """The checkout's commit, "-dirty" when the package differs from it; None without one."""
    folder = Path(__file__).resolve().parent

    def git(*args: str) -> str | None:
        result = subprocess.run(["git", *args], cwd=folder, capture_output=True, text=True)
        return result.stdout.strip() if result.returncode == 0 else None

    commit = git("rev-parse", "--short", "HEAD")
    if commit is None:
        return None
    changed = git("status", "--porcelain", "--", ":/ems_vllm", ":/csrc", ":/configs")
    return f"{commit}-dirty" if changed else commit
