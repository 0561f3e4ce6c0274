# SPDX-License-Identifier: Apache-2.0
"""Dependencies run in one direction, and vLLM is imported by its adapters only."""

import ast
import re
from pathlib import Path

import pytest
from import_graph import between_parts, circles, import_graph, imported, modules, part

PACKAGE = Path(__file__).resolve().parents[1] / "ems_vllm"
# By package: what its parts, files or folders, may import: the layers before their own.
LAYERS = {
    "ems_vllm": (
        ("_version", "confidence", "keys", "registry", "spans", "vllm_versions"),
        ("layer_shares", "head_shares"),
        ("_C",),
        ("plan",),
        ("ops",),
        ("policies",),
        ("config",),
        ("capacity", "methods"),
        ("plan_command",),
        ("eval",),
        ("advise",),
        ("patches",),
        ("cpu_platform",),
        ("engine",),
        ("doctor",),
        ("plugin", "cli"),
    ),
    "ems_vllm.engine": (
        (
            "cache_dtype",
            "holding",
            "kernels",
            "measuring",
            "observation",
            "orders",
            "pools",
            "refusal",
            "report",
            "totals",
        ),
        ("scheduler",),
        ("kv_cache_spec",),
        ("group",),
        ("attention",),
        ("worker",),
        ("frontend",),
        ("status",),
    ),
    "ems_vllm.doctor": (
        ("live", "start"),
        ("command",),
    ),
    "ems_vllm.eval": (
        ("script", "questions"),
        ("records",),
        ("server", "report", "transformers_engine"),
        ("lab", "calibration"),
        ("command",),
    ),
}
# At the top, types and what is imported in a function may come from a later layer.
AT_IMPORT_TIME = {"ems_vllm"}
ADAPTERS = ("engine", "patches", "cpu_platform", "plugin", "vllm_versions")
# Of the command line, which must not wait for vLLM: imports it in functions alone.
PATIENT_ADAPTER = "ems_vllm.doctor.start"
MODULES = modules()


@pytest.mark.parametrize("package", LAYERS)
def test_no_layer_imports_its_own_or_a_later_one(package):
    rank = {name: rank for rank, names in enumerate(LAYERS[package]) for name in names}
    graph = import_graph(at_import_time=package in AT_IMPORT_TIME)
    parts = between_parts(graph, package)
    assert set(parts) == set(rank)
    climbing = [
        f"{own} imports {other}"
        for own, others in parts.items()
        for other in sorted(others)
        if rank[other] >= rank[own]
    ]
    assert not climbing


def test_imports_run_in_no_circle():
    """Counting what is imported inside functions, and for type checking alone."""
    assert circles(import_graph()) == []


def test_circles_are_found_wherever_they_close():
    graph = {"a": {"b"}, "b": {"c", "d"}, "c": {"b"}, "d": {"e"}, "e": {"d", "f"}, "f": set()}
    assert sorted(circles(graph)) == [["b", "c"], ["d", "e"]]
    graph["f"] = {"a"}
    assert circles(graph) == [["a", "b", "c", "d", "e", "f"]]
    graph["b"].remove("c")
    assert circles(graph) == [["a", "b", "d", "e", "f"]]


def test_imports_are_seen_wherever_they_stand():
    tree = ast.parse(
        "import a\n"
        "if TYPE_CHECKING:\n    from b import c\n"
        "def f():\n    import d.e\n"
        "class C:\n    from f import g\n"
    )
    assert sorted(imported(tree)) == ["a", "b.c", "d.e", "f.g"]
    assert sorted(imported(tree, at_import_time=True)) == ["a", "f.g"]


@pytest.mark.parametrize("module", MODULES)
def test_only_adapters_import_vllm(module):
    if part(module, "ems_vllm") in ADAPTERS:
        return
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    names = imported(tree, at_import_time=f"{module}.".startswith(f"{PATIENT_ADAPTER}."))
    assert not [name for name in names if name.split(".")[0] == "vllm"]


@pytest.mark.parametrize("module", ["ems_vllm.cli", "ems_vllm.doctor.live.report"])
def test_the_command_line_waits_for_vllm_in_functions_alone(module):
    """Counting what its modules import from others, and these in turn."""
    graph = import_graph(at_import_time=True)
    reached, left = set(), [module]
    while left:
        name = left.pop()
        if name not in reached:
            reached.add(name)
            left += graph[name]
    for name in reached:
        names = imported(ast.parse(MODULES[name].read_text("utf-8")), at_import_time=True)
        assert not [one for one in names if one.split(".")[0] == "vllm"], name


def test_the_order_is_that_of_the_architecture_page():
    page = (PACKAGE.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
    order = page.split("(`tests/test_imports.py`): ")[1].split(".\n")[0]
    named = tuple(tuple(re.findall(r"`(\w+)`", names)) for names in order.split(";"))
    assert named == LAYERS["ems_vllm"]


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
