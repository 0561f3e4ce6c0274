# SPDX-License-Identifier: Apache-2.0
"""The import graph of ems_vllm: what imports what, and where imports go round in a circle.

Usage: python tests/import_graph.py [PACKAGE ...]

Prints files, arrows between them and circles, package by package; those named, or all at the top.
An arrow is an import anywhere in a file: at its top, inside a function, or for type checking alone.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

Graph = dict[str, set[str]]
"""By module, the other modules of the package that it imports."""


def modules(package: str = "ems_vllm") -> dict[str, Path]:
    """Files, and stubs of what is compiled, by the name under which they are imported."""
    folder = ROOT.joinpath(*package.split("."))
    found = {}
    for path in sorted((*folder.rglob("*.py"), *folder.rglob("*.pyi"))):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        found[name.removesuffix(".__init__")] = path
    return found


def import_graph(package: str = "ems_vllm", *, at_import_time: bool = False) -> Graph:
    """All modules of a package, with their imports of one another; see `imported`."""
    files = modules(package)
    graph: Graph = {}
    for module, path in files.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        # What is imported from a package may be a module of it.
        names = [
            name if name in files else name.rpartition(".")[0]
            for name in imported(tree, at_import_time=at_import_time)
        ]
        graph[module] = {name for name in names if name in files} - {module}
    return graph


def imported(tree: ast.AST, *, at_import_time: bool = False) -> list[str]:
    """Names that a file imports, those of modules and `module.name` for what is taken from one.

    Args:
        tree: Its syntax tree; it has no relative imports.
        at_import_time: Leave out what is imported inside functions, or for type checking alone.
    """
    found = []
    stack = [tree]
    while stack:
        node = stack.pop()
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative imports hide what they name"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
        if at_import_time and _is_later(node):
            continue
        stack += ast.iter_child_nodes(node)
    return found


def _is_later(node: ast.AST) -> bool:
    """Whether what is inside runs after the import, or never."""
    if isinstance(node, ast.If):
        return "TYPE_CHECKING" in ast.unparse(node.test)
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)


def part(module: str, package: str) -> str | None:
    """The part of a package that a module belongs to, a file or a subpackage; None outside."""
    rest = module.removeprefix(f"{package}.")
    return None if rest == module else rest.split(".")[0]


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Sets of modules that all reach one another, each in alphabetical order (Tarjan, 1972)."""
    order: dict[str, int] = {}
    lowest: dict[str, int] = {}
    open_modules: list[str] = []
    found = []

    def visit(module: str) -> None:
        order[module] = lowest[module] = len(order)
        open_modules.append(module)
        for other in sorted(graph[module]):
            if other not in order:
                visit(other)
                lowest[module] = min(lowest[module], lowest[other])
            elif other in open_modules:
                lowest[module] = min(lowest[module], order[other])
        if lowest[module] == order[module]:
            start = open_modules.index(module)
            members = open_modules[start:]
            del open_modules[start:]
            if len(members) > 1:
                found.append(sorted(members))

    for module in graph:
        if module not in order:
            visit(module)
    return found


def between_parts(graph: Mapping[str, set[str]], package: str) -> Graph:
    """The graph of a package's parts."""
    parts: Graph = {}
    for module, others in graph.items():
        own = part(module, package)
        if own is not None:
            reached = {found for other in others if (found := part(other, package))}
            parts.setdefault(own, set()).update(reached - {own})
    return parts


def main(packages: list[str]) -> None:
    if not packages:
        top = sorted((ROOT / "ems_vllm").glob("*/__init__.py"))
        packages = [f"ems_vllm.{path.parent.name}" for path in top]
    whole = import_graph()
    for package in ["ems_vllm", *packages]:
        graph = import_graph(package)
        arrows = sum(map(len, graph.values()))
        parts = between_parts(whole, package)
        between = sum(map(len, parts.values()))
        print(
            f"{package}: {len(graph)} files, {arrows} arrows; {len(parts)} parts, {between} arrows "
            f"between them; {len(circles(graph))} circles"
        )
        for members in circles(graph):
            print("  circle:", " ".join(members))


if __name__ == "__main__":
    main([f"ems_vllm.{name.removeprefix('ems_vllm.')}" for name in sys.argv[1:]])
