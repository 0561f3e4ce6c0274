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


def test_kernel_headers_include_no_torch():
    for header in (PACKAGE.parent / "csrc" / "include").rglob("*.h"):
        for line in header.read_text(encoding="utf-8").splitlines():
            if line.startswith("#include"):
                assert not any(word in line for word in ("torch", "ATen", "c10")), (header, line)
