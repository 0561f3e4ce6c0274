# SPDX-License-Identifier: Apache-2.0
"""Unpacks what `make gpu-pack` packed, on a GPU machine without a network.

Usage: python benchmarks/gpu/packages.py

Everything goes to build/gpu-site/, which gpu_check.py puts on PYTHONPATH; the packages of the
machine stay as they are. Nothing is done where nothing was packed.
"""

from __future__ import annotations

import shutil
import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKED = ROOT / ".gpu"
SITE = ROOT / "build" / "gpu-site"


def unpack(archive: Path, folder: Path) -> None:
    """A tar file that was compressed with xz."""
    # Not as a stream ("r|xz"), which takes ten times as long.
    with tarfile.open(archive, mode="r:xz") as tar:
        tar.extractall(folder, filter="data")


def add_command(folder: Path) -> None:
    """`vllm`, which the evaluation starts; pip's own script would name another Python."""
    path = folder / "bin" / "vllm"
    path.parent.mkdir(exist_ok=True)
    path.write_text(f'#!/bin/sh\nexec {sys.executable} -m vllm.entrypoints.cli.main "$@"\n')
    path.chmod(0o755)


def main() -> None:
    archive = PACKED / "site.tar.xz"
    if not archive.is_file():
        print(f"{archive.relative_to(ROOT)} is not there: the machine's own packages are used")
        return
    stamp, packed = SITE / "installed", f"{archive.stat().st_size} {archive.stat().st_mtime}"
    if stamp.is_file() and stamp.read_text() == packed:
        print("installed before")
        return
    shutil.rmtree(SITE, ignore_errors=True)
    SITE.mkdir(parents=True)
    unpack(archive, SITE)
    add_command(SITE)
    stamp.write_text(packed)
    print(f"installed into {SITE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
