# SPDX-License-Identifier: Apache-2.0
"""The shared library: what it links to, how it loads, and its variants for the CPU."""

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ems_vllm
from ems_vllm import ops
from ems_vllm.ops import library

TESTS = Path(__file__).parent

pytestmark = pytest.mark.cpu_only


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
    )


def test_uses_only_the_stable_interface_of_torch():
    """No C++ symbol of torch: their names carry a namespace, mangled with its length."""
    symbols = subprocess.run(
        ["nm", "-D", "--undefined-only", library._LIBRARY],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    names = [line.split()[-1] for line in symbols.splitlines()]
    assert any(name.startswith("aoti_torch_") for name in names)
    assert [name for name in names if re.search(r"^_Z.*(3c10|2at|5torch)", name)] == []
    assert [name for name in names if name.startswith("Py") or name.startswith("_Py")] == []


def test_every_operator_has_all_its_parts():
    # What the library registers: a file, a function and a test for each.
    namespace = library.operators()
    registered = {
        name.removeprefix("ems_vllm::")
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("ems_vllm::")
    }
    assert set(ops.OPERATORS) == registered
    for name, operator in ops.OPERATORS.items():
        assert (TESTS / f"test_{name}.py").exists()
        assert getattr(ops, name) is operator
        assert name in ops.__all__
        assert Path(operator.reference.__code__.co_filename).stem == name
        schema = getattr(namespace, name).default._schema
        assert schema.returns == []
        parameters = inspect.signature(operator).parameters.values()
        assert [p.name for p in parameters] == [argument.name for argument in schema.arguments]
        for parameter, argument in zip(parameters, schema.arguments, strict=True):
            has_default = parameter.default is not inspect.Parameter.empty
            assert argument.has_default_value() == has_default
            assert argument.default_value == (parameter.default if has_default else None)


def test_operators_can_run_their_own_bodies():
    query, slots = torch.ones(1, 1, 64), torch.tensor([2])

    def recorded(query):
        ring = torch.zeros(2, 2, 1, 64)
        ops.record_queries(query, ring_slots=slots, ring=ring)
        return ring[1, 0, 0, 0].item()

    # No kernel takes float64.
    with ops.reference_operators():
        assert recorded(query.double()) == 1
        with ops.implemented_by(library.operators()):
            assert recorded(query) == 1
            with pytest.raises(RuntimeError, match="query must"):
                recorded(query.double())
        assert recorded(query.double()) == 1
    # After an error, too.
    with pytest.raises(IndexError), ops.reference_operators():
        ops.record_queries(query, slots, ring=query[:0])
    with pytest.raises(RuntimeError, match="query must"):
        recorded(query.double())


def test_operators_can_be_traced():
    """As vLLM does with compilation on: no operator breaks the graph."""

    def recorded(query, slots, ring):
        ops.record_queries(query, slots, ring)
        return ring + 1

    args = torch.ones(1, 1, 64), torch.tensor([2]), torch.zeros(2, 2, 1, 64)
    expected = recorded(*(arg.clone() for arg in args))
    compiled = torch.compile(recorded, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*args), expected)


def test_importing_the_package_loads_neither_torch_nor_vllm():
    code = "import sys, ems_vllm; assert not {'torch', 'vllm', 'ems_vllm._C'} & set(sys.modules)"
    done = run_python(code)
    assert done.returncode == 0, done.stderr


def test_missing_library_names_the_remedy(monkeypatch, tmp_path):
    monkeypatch.setattr(library, "_LIBRARY", tmp_path / "absent.so")
    with pytest.raises(ImportError, match=r"not built: .*absent.so does not exist.*`make build`"):
        library.operators.__wrapped__()


def test_library_that_cannot_be_loaded_names_the_remedy(monkeypatch, tmp_path):
    (tmp_path / "broken.so").write_text("not a library")
    monkeypatch.setattr(library, "_LIBRARY", tmp_path / "broken.so")
    with pytest.raises(ImportError, match=r"torch .* cannot load .*broken.so.*`make build`"):
        library.operators.__wrapped__()


def test_build_info():
    info = ems_vllm.build_info()
    assert info["version"] == ems_vllm.__version__
    assert "portable" in info["cpu_variants"]
    assert info["torch_target"] == "2.10"
    assert bool(info["cuda_head_sizes"]) == bool(info["cuda_archs"])


VARIANT_TESTS = [
    "test_score_queries.py::test_dtype_and_layout",
    "test_score_window.py::test_dtype_and_layout",
    "test_assign_classes.py::test_dtype_and_layout",
    "test_assign_classes.py::test_ties_go_to_the_lower_rank",
    "test_merge_compact.py::test_dtype_and_layout",
    "test_key_moments.py::test_dtype_and_layout",
    "test_key_scores.py::test_dtype_and_layout",
    "test_vector_norms.py::test_dtype_and_layout",
]


@pytest.mark.parametrize("variant", ems_vllm.build_info()["cpu_variants"][1:])
def test_other_cpu_variants(variant):
    """The numeric tests again, with kernels that this processor would not choose by itself."""
    flags = Path("/proc/cpuinfo").read_text().split()
    if variant != "portable" and variant not in flags and f"{variant}f" not in flags:
        pytest.skip(f"this processor has no {variant}")
    tests = [str(TESTS / name) for name in VARIANT_TESTS]
    options = ["-q", "-p", "no:cacheprovider", "-k", "cpu and (separate or ties)"]
    code = f"import pytest; raise SystemExit(pytest.main({options + tests}))"
    done = run_python(code, EMS_CPU_VARIANT=variant)
    assert done.returncode == 0, done.stdout


def test_unknown_cpu_variant_is_refused():
    code = (
        "import torch; from ems_vllm import ops; a = torch.zeros(1, 1, 1, 1, 1);"
        "i = torch.zeros(1, dtype=torch.int32);"
        "rows = (i[None], i, i + 1, i + 1, i, i[None]);"
        "ops.score_queries(a[0, 0], a[0], *rows, None, 1.0, 1, a[0, 0])"
    )
    done = run_python(code, EMS_CPU_VARIANT="sse9")
    assert "RuntimeError: EMS_CPU_VARIANT=sse9 names no variant" in done.stderr
