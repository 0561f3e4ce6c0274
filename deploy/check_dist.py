# SPDX-License-Identifier: Apache-2.0
"""Check what `make dist` built: files, metadata and the names of both distributions.

Usage: python deploy/check_dist.py [FOLDER]

Says in one line each what is missing, what should not be there, and which metadata a package index
would refuse; silent files and a summary otherwise.
"""

import argparse
import os
import re
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from packaging.metadata import Metadata
from packaging.utils import parse_sdist_filename, parse_wheel_filename

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "ems_vllm"
# What a build reads besides the package and csrc/, and what says what this is.
TOP_LEVEL = {"CHANGELOG.md", "LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.py"}
# Both extension modules: of one Python version, and of every Python and torch.
MODULES = (r"ems_vllm/_C\.cpython-\d+-[\w-]+\.so", r"ems_vllm/_ops\.abi3\.so")
_MADE = {".so", ".pyc"}


def files_below(folder: str) -> set[str]:
    """Files of the checkout below a folder, links followed, by their paths from the root."""
    found = set()
    for path, _, names in os.walk(ROOT / folder, followlinks=True):
        files = (Path(path, name) for name in names)
        found |= {str(file.relative_to(ROOT)) for file in files if file.suffix not in _MADE}
    return found


def source_files() -> set[str]:
    """Files that the source distribution should hold."""
    return TOP_LEVEL | files_below("csrc") | files_below(PACKAGE)


def sdist_contents(path: Path) -> tuple[set[str], bytes]:
    """Files of a source distribution, without those that setuptools makes, and its metadata."""
    with tarfile.open(path) as archive:
        names = (member.name for member in archive.getmembers() if member.isfile())
        files = {name.partition("/")[2] for name in names}
        stem = path.name.removesuffix(".tar.gz")
        metadata = archive.extractfile(f"{stem}/PKG-INFO")
        assert metadata is not None
        return {name for name in files if not _is_made_by_setuptools(name)}, metadata.read()


def _is_made_by_setuptools(name: str) -> bool:
    return name in {"PKG-INFO", "setup.cfg"} or name.startswith(f"{PACKAGE}.egg-info/")


def wheel_contents(path: Path) -> tuple[set[str], bytes]:
    """Files of the package in a wheel, and the wheel's metadata."""
    with zipfile.ZipFile(path) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
        (info,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        folder = info.rpartition("/")[0]
        return {name for name in names if not name.startswith(folder)}, archive.read(info)


def compare(what: str, found: set[str], expected: set[str]) -> Iterator[str]:
    """Complaints about files."""
    for name in sorted(expected - found):
        yield f"{what}: {name} is missing"
    for name in sorted(found - expected):
        yield f"{what}: {name} should not be there"


def check_metadata(what: str, data: bytes, version: str) -> Iterator[str]:
    """Complaints about metadata: what the specification forbids, and another version."""
    try:
        metadata = Metadata.from_email(data, validate=True)
    except ExceptionGroup as group:
        yield from (f"{what}: {error}" for error in group.exceptions)
        return
    if str(metadata.version) != version:
        yield f"{what}: version {metadata.version} in the metadata, {version} in the name"
    if metadata.description_content_type != "text/markdown" or not metadata.description:
        yield f"{what}: no description in Markdown"


def check_sdist(path: Path) -> Iterator[str]:
    files, metadata = sdist_contents(path)
    yield from compare(path.name, files, source_files())
    yield from check_metadata(path.name, metadata, str(parse_sdist_filename(path.name)[1]))


def check_wheel(path: Path) -> Iterator[str]:
    files, metadata = wheel_contents(path)
    for pattern in MODULES:
        modules = {name for name in files if re.fullmatch(pattern, name)}
        if len(modules) != 1:
            yield f"{path.name}: {len(modules)} files like {pattern}, not one"
        files -= modules
    yield from compare(path.name, files, files_below(PACKAGE))
    yield from check_metadata(path.name, metadata, str(parse_wheel_filename(path.name)[1]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, nargs="?", default=ROOT / "dist")
    folder = parser.parse_args().folder
    sdists, wheels = sorted(folder.glob("*.tar.gz")), sorted(folder.glob("*.whl"))
    complaints = [line for path in sdists for line in check_sdist(path)]
    complaints += [line for path in wheels for line in check_wheel(path)]
    if not (sdists and wheels):
        complaints.append(
            f"{folder} holds {len(sdists)} source distributions, {len(wheels)} wheels"
        )
    for line in complaints:
        print(line, file=sys.stderr)
    for path in () if complaints else (*sdists, *wheels):
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB, complete")
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
