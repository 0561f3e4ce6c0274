# SPDX-License-Identifier: Apache-2.0
"""Builds of score_queries that are timed beside the shipped one."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
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
        assert [(line["sample_stride"], line["lse_given"]) for line in builds[name]] == [
            (1, True),
            (4, True),
            (1, False),
        ]
        assert all(line["p50_ms"] > 0 for line in builds[name])
