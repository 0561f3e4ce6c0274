# SPDX-License-Identifier: Apache-2.0
"""Builds of score_queries that are timed beside the shipped one."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from gpu import prebuilt
from gpu.pack import extension

import ems_vllm

ROOT = Path(__file__).resolve().parents[1]
PATCHES = sorted((ROOT / "benchmarks" / "gpu" / "variants").glob("*.patch"))


@pytest.mark.parametrize("patch", PATCHES, ids=lambda path: path.stem)
def test_patches_fit_the_sources(patch, tmp_path):
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    changed = extension.apply(patch, tmp_path)
    assert changed
    for path in changed:
        source = ROOT / path.relative_to(tmp_path)
        assert source.read_bytes() != path.read_bytes()
    with pytest.raises(subprocess.CalledProcessError):
        extension.apply(patch, tmp_path)


def test_libraries_of_other_patches_are_built_again(tmp_path, monkeypatch):
    for name in ("PATCHES", "BUILT_VARIANTS"):
        (tmp_path / name).mkdir()
        monkeypatch.setattr(extension, name, tmp_path / name)
    assert extension.variants_are_built()
    (tmp_path / "PATCHES" / "a.patch").write_text("new")
    assert not extension.variants_are_built()
    (tmp_path / "BUILT_VARIANTS" / "a.patch").write_text("old")
    assert not extension.variants_are_built()
    (tmp_path / "BUILT_VARIANTS" / "a.patch").write_text("new")
    assert extension.variants_are_built()


def test_a_library_is_built_with_each_patch_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(extension, "COPY", tmp_path / "copy")
    monkeypatch.setattr(extension, "BUILT_VARIANTS", tmp_path / "copy" / "variants")

    def build_operators():
        library = tmp_path / "library.so"
        library.write_text(prebuilt.digest(extension.COPY))
        return library

    monkeypatch.setattr(extension, "build_operators", build_operators)
    extension.COPY.mkdir()
    extension.copy_sources()
    before = prebuilt.digest(extension.COPY)
    extension.build_variants()
    assert extension.variants_are_built()
    libraries = sorted(extension.BUILT_VARIANTS.glob("*.so"))
    assert [path.stem for path in libraries] == [path.stem for path in PATCHES]
    assert len({before, *(path.read_text() for path in libraries)}) == len(PATCHES) + 1
    # What the shipped library is built from then, and not taken for what was compiled last.
    assert prebuilt.digest(extension.COPY) == before
    for patch in PATCHES:
        for name in re.findall(r"^\+\+\+ b/(\S+)", patch.read_text(), re.M):
            changed = (extension.COPY / name).stat().st_mtime
            assert changed > (ROOT / name).stat().st_mtime


@pytest.mark.slow
def test_builds_are_timed_and_one_that_does_not_load_is_told(tmp_path):
    library = Path(ems_vllm.__file__).parent / "_ops.abi3.so"
    shutil.copy(library, tmp_path / "same.so")
    (tmp_path / "torn.so").write_bytes(library.read_bytes()[:1000])
    script = ROOT / "benchmarks" / "gpu" / "time_variants.py"
    out = tmp_path / "variants.json"
    command = [sys.executable, script, "--built", tmp_path, "--out", out]
    done = subprocess.run([*command, "--device", "cpu", "--length", "64"], cwd=ROOT)
    assert done.returncode == 1
    builds = json.loads(out.read_text())["builds"]
    assert list(builds) == ["shipped", "same", "torn"]
    assert builds["torn"] is None
    for name in ("shipped", "same"):
        timed = {
            (line["global_queries"], line["sample_stride"], line["lse_given"])
            for line in builds[name]
        }
        # The settings' defaults, and where the kernel itself takes longest.
        assert {(256, 1, True), (256, 1, False), (None, 4, True), (None, 1, True)} <= timed
        assert all(line["p50_ms"] > 0 for line in builds[name])
