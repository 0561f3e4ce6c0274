# SPDX-License-Identifier: Apache-2.0
"""How many operations a compaction asks of the device: on a GPU, a launch each at least."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from policies.contexts import Row, build_context
from torch.utils._python_dispatch import TorchDispatchMode

from ems_vllm.config import load_config, recipes
from ems_vllm.policies.policy import Policy

# EMS takes 119, of which 10 are ours; 227 when torch read the cache and ranked entries.
MOST = 125
SMALL = [Row(64, 3, 16)]
LARGE = [Row(800, 3, 48), Row(90, 2, 16), Row(333, 1, 32)]


class OperationCounter(TorchDispatchMode):
    """Counts what torch and our library compute; views and allocations are free."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returned = [value.alias_info for value in func._schema.returns]
        is_view = any(alias is not None and not alias.is_write for alias in returned)
        # A product of matrices reshapes and copies what it broadcasts over several rows.
        is_reshape = func.name() in ("aten::clone", "aten::_unsafe_view")
        if not is_view and not is_reshape and "empty" not in func.name():
            self.counts[func.name()] += 1
        return func(*args, **(kwargs or {}))


def operations(recipe: str, rows: list[Row]) -> Counter[str]:
    windows = {"recent_window": 16, "obs_window": 4}
    policy = Policy.from_config(load_config({"recipe": recipe, "budget": 16, **windows}))
    context = build_context(rows)
    with torch.no_grad(), OperationCounter() as counter:
        policy.compact(context)
    return counter.counts


# rkv compares all pairs, in slices of bounded size.
@pytest.mark.parametrize("recipe", [name for name in recipes.names() if name != "rkv"])
def test_operations_do_not_grow_with_requests_and_entries(recipe):
    assert operations(recipe, LARGE) == operations(recipe, SMALL)


def test_a_compaction_by_ems_takes_few_operations():
    counts = operations("ems", LARGE)
    assert counts.total() <= MOST, counts.most_common()
    ours = {name: count for name, count in counts.items() if name.startswith("ems_vllm::")}
    assert ours.pop("ems_vllm::rank_entries") == 3  # one of each order
    assert set(ours.values()) == {1}


def test_nothing_waits_for_the_device():
    assert "aten::_local_scalar_dense" not in operations("ems", LARGE)
