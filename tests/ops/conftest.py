# SPDX-License-Identifier: Apache-2.0
"""Runs every test of this folder over every implementation of the operators.

A test marked cpu_only is about what only the CPU kernels do; one marked large would take the
emulator minutes.
"""

import pytest
import torch
from ops.implementations import namespace

from ems_vllm import ops

IMPLEMENTATIONS = (
    "cpu",
    pytest.param("emulated", marks=pytest.mark.emulated),
    pytest.param("sm90", marks=pytest.mark.emulated),
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
        ],
    ),
)

# Files about operators that have a kernel of their own for compute capability 9.0a.
SM90_TESTS = ("test_score_queries",)


# Of module scope, so that property tests may use it.
@pytest.fixture(scope="module", params=IMPLEMENTATIONS, autouse=True)
def implementation(request):
    with ops.implemented_by(namespace(request.param)):
        yield request.param


def pytest_collection_modifyitems(config, items):
    left_out = {
        "emulated": ("cpu_only", "large"),
        "sm90": ("cpu_only", "large"),
        "cuda": ("cpu_only",),
    }

    def runs(item):
        name = getattr(getattr(item, "callspec", None), "params", {}).get("implementation", "cpu")
        if name == "sm90" and item.path.stem not in SM90_TESTS:
            return False
        return not any(item.get_closest_marker(mark) for mark in left_out.get(name, ()))

    dropped = [item for item in items if not runs(item)]
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = [item for item in items if runs(item)]
