# SPDX-License-Identifier: Apache-2.0
"""Dependencies run in one direction, and vLLM is imported by its adapters only."""

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "ems_vllm"
# Each layer may import itself and the ones before it.
LAYERS = (
    ("_version", "keys", "registry", "spans"),
    ("layer_shares", "head_shares"),
    ("_C", "plan"),
    ("ops",),
    ("policies",),
    ("config",),
    ("capacity",),
    ("eval",),
    ("patches",),
    ("platform",),
    ("engine",),
    ("plugin", "plan_command", "cli"),
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
ADAPTERS = ("engine", "patches", "platform", "plugin")
FILES = sorted(PACKAGE.rglob("*.py"))


def layer(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    return relative.parts[0].removesuffix(".py")


def imports(path: Path, *, at_import_time: bool) -> list[str]:
    """Modules that a file imports; inside functions too unless only import time counts."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = []
    stack: list[ast.AST] = [tree]
    while stack:
        node = stack.pop()
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [f"{node.module}.{alias.name}" for alias in node.names]
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if at_import_time and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        stack += ast.iter_child_nodes(node)
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_layer_imports_a_later_one(path):
    own = layer(path)
    if own == "__init__":
        return
    for module in imports(path, at_import_time=True):
        if module.startswith("ems_vllm."):
            other = module.split(".")[1]
            if other in RANK:
                assert RANK[other] <= RANK[own], f"{path.name} imports {module}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_adapters_import_vllm(path):
    if layer(path) in ADAPTERS:
        return
    used = [name for name in imports(path, at_import_time=False) if name.split(".")[0] == "vllm"]
    assert not used


def test_every_layer_is_ranked():
    found = {layer(path) for path in FILES} - {"__init__"}
    assert found <= set(RANK)


def test_the_order_is_that_of_the_architecture_page():
    page = (PACKAGE.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
    order = page.split("(`tests/test_imports.py`): ")[1].split(".\n")[0]
    named = tuple(tuple(re.findall(r"`(\w+)`", names)) for names in order.split(";"))
    assert named == LAYERS


CSRC = PACKAGE.parent / "csrc"
KERNEL_SOURCES = sorted(
    path
    for pattern in ("include/**/*.h", "include/**/*.cuh", "cuda/*.cu")
    for path in CSRC.glob(pattern)
)


def includes(path: Path) -> list[str]:
    """Files that a C++ file includes, as it names them."""
    return re.findall(r'^\s*#\s*include\s*[<"](.+?)[>"]', path.read_text(encoding="utf-8"), re.M)


def all_includes(path: Path) -> dict[str, Path]:
    """Files that a C++ file includes, also by way of others of ours, each with who includes it."""
    found: dict[str, Path] = {}
    left = [path]
    while left:
        file = left.pop()
        for name in includes(file):
            if name not in found:
                found[name] = file
                places = (folder / name for folder in (file.parent, CSRC, CSRC / "include"))
                left += [place for place in places if place.is_file()][:1]
    return found


@pytest.mark.parametrize("path", KERNEL_SOURCES, ids=lambda path: str(path.relative_to(CSRC)))
def test_kernels_include_no_torch(path):
    for name, file in all_includes(path).items():
        assert name.split("/")[0] not in ("torch", "ATen", "c10"), f"{file} includes {name}"


def test_includes_are_followed():
    """From a kernel to the headers that it shares, and from a host file to torch."""
    assert "ems/params.h" in all_includes(CSRC / "cuda" / "score_queries.cu")
    assert "host/on_device.h" in includes(CSRC / "head_pages.cpp")
    assert "torch/csrc/stable/accelerator.h" in all_includes(CSRC / "host" / "on_device.h")
