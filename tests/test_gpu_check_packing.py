# SPDX-License-Identifier: Apache-2.0
"""What `make gpu-pack` packs fits a transfer, and what came over is put in its place."""

import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

import pytest
from gpu import packages, prebuilt, take_extension
from gpu.pack import transfer

ROOT = Path(__file__).resolve().parents[1]


def test_the_checkout_leaves_room_for_what_is_packed():
    if not (ROOT / ".git").exists():
        pytest.skip("git says what is transferred")
    tree = transfer.tree_bytes()
    assert tree > 1_000_000
    for name, most in transfer.PACKED.items():
        assert transfer.problem(name, most, tree) is None


def test_what_does_not_fit_is_a_sentence():
    most = transfer.PACKED[".gpu"]
    tree = transfer.LIMIT - most
    assert transfer.problem(".gpu", most, tree) is None
    assert "of a transfer" in transfer.problem(".gpu", most, tree + 1)
    assert "more than the" in transfer.problem(".gpu", most + 1, 0)


def test_ignored_files_are_not_transferred_and_new_ones_are(tmp_path):
    git = ["git", "-C", str(tmp_path)]
    subprocess.run([*git, "init", "-q"], check=True)
    for name, size in (("tracked", 10), ("new", 200), ("ignored", 3000)):
        (tmp_path / name).write_bytes(bytes(size))
    (tmp_path / ".git" / "info" / "exclude").write_text("ignored\n")
    subprocess.run([*git, "add", "tracked"], check=True)
    assert transfer.tree_bytes(tmp_path) == 210


def test_packages_are_unpacked_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(packages, "ROOT", tmp_path)
    monkeypatch.setattr(packages, "PACKED", tmp_path / ".gpu")
    monkeypatch.setattr(packages, "SITE", tmp_path / "site")
    packages.main()
    assert "machine's own packages" in capsys.readouterr().out
    (tmp_path / ".gpu").mkdir()
    (tmp_path / "module.py").write_text("VALUE = 1")
    with tarfile.open(tmp_path / ".gpu" / "site.tar.xz", "w:xz") as tar:
        tar.add(tmp_path / "module.py", "./package/module.py")
    packages.main()
    assert (tmp_path / "site" / "package" / "module.py").read_text() == "VALUE = 1"
    assert sys.executable in (tmp_path / "site" / "bin" / "vllm").read_text()
    packages.main()
    assert "installed before" in capsys.readouterr().out


@pytest.fixture
def checkout(tmp_path):
    """Sources of an extension."""
    for name in ("setup.py", "ems_vllm/_version.py", "csrc/cuda/op.cu"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return tmp_path


def test_an_extension_fits_its_own_sources_gpu_and_python_alone(checkout):
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    built = prebuilt.Built(prebuilt.digest(checkout), "9.0a", suffix)
    assert built.reason_against(checkout, "9.0a") is None
    assert "8.0" in built.reason_against(checkout, "8.0")
    other = prebuilt.Built(built.sources, "9.0a", ".cpython-39.so")
    assert ".cpython-39.so" in other.reason_against(checkout, "9.0a")
    (checkout / "csrc" / "cuda" / "op.cu").write_text("changed")
    assert "other sources" in built.reason_against(checkout, "9.0a")


def test_a_packed_extension_is_put_in_place(checkout, monkeypatch):
    folder = checkout / "unpacked"
    for name in ("_ops.abi3.so", "ems_vllm.egg-info/entry_points.txt", "logs/op.log"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    prebuilt.Built(prebuilt.digest(checkout), "9.0a", suffix).write(folder)
    packed = checkout / "extension.tar.xz"
    with tarfile.open(packed, "w:xz") as tar:
        for path in folder.iterdir():
            tar.add(path, path.name)
    for name, value in {"ROOT": checkout, "PACKED": packed, "UNPACKED": checkout / "u"}.items():
        monkeypatch.setattr(take_extension, name, value)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0a")
    assert take_extension.main() == 0
    assert (checkout / "ems_vllm" / "_ops.abi3.so").read_text() == "_ops.abi3.so"
    assert (checkout / "ems_vllm.egg-info" / "entry_points.txt").is_file()
    assert len(list(checkout.glob("build/temp.*/cuda/op.log"))) == 1
    # Of other sources it is not taken: setup.py, which here is none, is run.
    (checkout / "csrc" / "cuda" / "op.cu").write_text("changed")
    assert take_extension.main() != 0
