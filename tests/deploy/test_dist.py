# SPDX-License-Identifier: Apache-2.0
"""Source distribution and wheel hold what they should, as far as that shows without compiling.

`make dist` builds both and compares the same lists with what is in the archives.
"""

import io
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import check_dist
import pytest
import yaml

import ems_vllm

ROOT = check_dist.ROOT
METADATA = (
    f"Metadata-Version: 2.4\nName: ems-vllm\nVersion: {ems_vllm.__version__}\n"
    "Description-Content-Type: text/markdown\n\n# ems-vllm\n"
)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What setuptools would put into the distributions, as the build backend has it."""
    folder = tmp_path_factory.mktemp("dist")
    (folder / "info").mkdir()
    subprocess.run(
        [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", folder / "info",
         "build_py", "--build-lib", folder / "lib"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    )  # fmt: skip
    return folder


def test_source_distribution_holds_what_a_build_needs(built: Path) -> None:
    listed = (built / "info" / "ems_vllm.egg-info" / "SOURCES.txt").read_text().splitlines()
    # setuptools' own are named by where this test put them.
    found = {name for name in listed if not Path(name).is_absolute()}
    assert list(check_dist.compare("sdist", found, check_dist.source_files())) == []
    assert "csrc/include/ems/params.h" in found
    assert "csrc/tools/nvcc.py" in found


def test_wheel_holds_the_package_and_its_data(built: Path) -> None:
    folder = built / "lib"
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert list(check_dist.compare("wheel", found, check_dist.files_below("ems_vllm"))) == []
    for name in ("py.typed", "_C.pyi", "configs/policies/ems.yaml"):
        assert f"ems_vllm/{name}" in found


def test_metadata_is_accepted_by_a_package_index(built: Path) -> None:
    data = (built / "info" / "ems_vllm.egg-info" / "PKG-INFO").read_bytes()
    assert list(check_dist.check_metadata("sdist", data, ems_vllm.__version__)) == []
    assert b"License-Expression: Apache-2.0" in data


def wheel(folder: Path, files: set[str]) -> Path:
    path = folder / f"ems_vllm-{ems_vllm.__version__}-cp311-cp311-linux_x86_64.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name in files:
            archive.writestr(name, "")
        archive.writestr(f"ems_vllm-{ems_vllm.__version__}.dist-info/METADATA", METADATA)
    return path


def test_check_of_a_wheel_names_what_is_missing_and_what_is_too_much(tmp_path: Path) -> None:
    modules = {"ems_vllm/_C.cpython-311-x86_64-linux-gnu.so", "ems_vllm/_ops.abi3.so"}
    whole = check_dist.files_below("ems_vllm") | modules
    assert list(check_dist.check_wheel(wheel(tmp_path, whole))) == []
    files = whole - {"ems_vllm/py.typed", "ems_vllm/_ops.abi3.so"} | {"tests/conftest.py"}
    complaints = "\n".join(check_dist.check_wheel(wheel(tmp_path, files)))
    assert "ems_vllm/py.typed is missing" in complaints
    assert "tests/conftest.py should not be there" in complaints
    assert r"0 files like ems_vllm/_ops\.abi3\.so" in complaints
    assert len(complaints.splitlines()) == 3


def test_check_of_a_source_distribution_compares_files_and_version(tmp_path: Path) -> None:
    path = tmp_path / "ems_vllm-9.9.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name in check_dist.source_files() - {"csrc/plan.h"} | {"PKG-INFO", "setup.cfg"}:
            data = METADATA.encode() if name == "PKG-INFO" else b""
            member = tarfile.TarInfo(f"ems_vllm-9.9/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    missing, version = check_dist.check_sdist(path)
    assert missing.endswith("csrc/plan.h is missing")
    assert version.endswith(f"version {ems_vllm.__version__} in the metadata, 9.9 in the name")


def test_metadata_that_an_index_refuses_is_named() -> None:
    wrong = METADATA.replace("Metadata-Version: 2.4", "Metadata-Version: 2.4\nRequires-Dist: a b c")
    (complaint,) = check_dist.check_metadata("wheel", wrong.encode(), ems_vllm.__version__)
    assert "'a b c'" in complaint


def test_places_that_repeat_the_version_agree() -> None:
    """ems_vllm/_version.py has it; images are tagged with it, and the changelog begins with it."""
    suffixes = ("yaml", "yml", "md", "Dockerfile")
    places = [path for suffix in suffixes for path in ROOT.glob(f"deploy/**/*{suffix}")]
    texts = {path: path.read_text() for path in places}
    tagged = {
        str(path.relative_to(ROOT / "deploy")): set(
            re.findall(r"ems-vllm(?:-cpu)?:(\d[\w.]*)", text)
        )
        for path, text in texts.items()
    }
    assert {name for name, versions in tagged.items() if versions} >= {
        "docker-compose.yml", "README.md",
    }  # fmt: skip
    assert set().union(*tagged.values()) == {ems_vllm.__version__}
    chart = yaml.safe_load((ROOT / "deploy/helm/ems-vllm/Chart.yaml").read_text())
    assert chart["version"] == chart["appVersion"] == ems_vllm.__version__
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert re.search(r"^## \[?(\d+\.\d+\.\d+)", changelog, re.M)[1] == ems_vllm.__version__
