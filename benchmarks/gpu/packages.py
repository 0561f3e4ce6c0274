# SPDX-License-Identifier: Apache-2.0
"""Installs what `make gpu-pack` packed, on a GPU machine without a network.

Usage: python benchmarks/gpu/packages.py

Everything goes to build/gpu-site/, which gpu_check.py puts on PYTHONPATH; the packages of the
machine stay as they are. Nothing is done where nothing was packed.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKED = ROOT / ".gpu"
SITE = ROOT / "build" / "gpu-site"
# As pack.sh compresses.
_WINDOW = 2**27


def install_wheels(folder: Path) -> None:
    """All wheels of a folder, without a look at what they need."""
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check", "install"]
    options = ["--no-index", "--no-deps", "--no-compile", "--no-cache-dir", "--upgrade"]
    wheels = [str(path) for path in sorted(folder.glob("*.whl"))]
    subprocess.run([*pip, *options, "--target", str(SITE), *wheels], check=True)


def unpack(archive: Path) -> None:
    """A tar file that was compressed with zstd."""
    if shutil.which("zstd"):
        command = ["zstd", "-q", "--long=27", "-dc", str(archive)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as zstd:
            _extract(zstd.stdout)
        if zstd.returncode != 0:
            raise RuntimeError(f"{archive} is damaged")
        return
    sys.path.insert(0, str(SITE))
    import zstandard

    decompressor = zstandard.ZstdDecompressor(max_window_size=_WINDOW)
    with archive.open("rb") as file, decompressor.stream_reader(file) as stream:
        _extract(stream)


def _extract(stream: object) -> None:
    with tarfile.open(fileobj=stream, mode="r|") as tar:  # type: ignore[call-overload]
        tar.extractall(SITE, filter="data")


def main() -> None:
    if not PACKED.is_dir():
        print(f"{PACKED.name}/ is not there: the machine's own packages are used")
        return
    stamp = SITE / "installed"
    noted = (PACKED / "commit").read_text() if (PACKED / "commit").is_file() else ""
    if stamp.is_file() and stamp.read_text() == noted:
        print("installed already")
        return
    shutil.rmtree(SITE, ignore_errors=True)
    SITE.mkdir(parents=True)
    install_wheels(PACKED / "wheels")
    if importlib.util.find_spec("vllm") is None:
        unpack(PACKED / "vllm.tar.zst")
    stamp.write_text(noted)
    print(f"installed into {SITE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
