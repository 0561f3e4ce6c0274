# SPDX-License-Identifier: Apache-2.0
"""Puts the extension for this GPU in place: the one that `make gpu-pack` packed, else a new one.

Usage: python benchmarks/gpu/take_extension.py

TORCH_CUDA_ARCH_LIST says for which GPU. A packed one of other sources, or for another GPU or
Python, is not taken.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gpu.packages import unpack
from gpu.prebuilt import Built

ROOT = Path(__file__).resolve().parents[2]
PACKED = ROOT / ".gpu" / "extension.tar.xz"
UNPACKED = ROOT / "build" / "gpu-extension"


def take(folder: Path, root: Path) -> None:
    """Put an unpacked extension where setup.py would have put it."""
    for path in folder.glob("*.so"):
        shutil.copy2(path, root / "ems_vllm" / path.name)
    shutil.copytree(folder / "ems_vllm.egg-info", root / "ems_vllm.egg-info", dirs_exist_ok=True)
    tag = f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
    # What the compiler said of every kernel.
    logs = root / "build" / f"temp.{tag}" / "cuda"
    shutil.copytree(folder / "logs", logs, dirs_exist_ok=True)


def main() -> int:
    if PACKED.is_file():
        shutil.rmtree(UNPACKED, ignore_errors=True)
        UNPACKED.mkdir(parents=True)
        unpack(PACKED, UNPACKED)
        built = Built.read(UNPACKED)
        archs = os.environ.get("TORCH_CUDA_ARCH_LIST")
        reason = built.reason_against(ROOT, archs) if built else "it cannot be read"
        if reason is None:
            take(UNPACKED, ROOT)
            print("the packed extension is in place")
            return 0
        print(f"the packed extension is not taken: {reason}", flush=True)
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace", "egg_info"]
    return subprocess.run(command, cwd=ROOT, env=os.environ | {"EMS_CUDA": "1"}).returncode


if __name__ == "__main__":
    sys.exit(main())
