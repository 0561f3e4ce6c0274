# SPDX-License-Identifier: Apache-2.0
"""What a compaction allocates stays within what its policy declares, and memory is set aside for.

On torch's meta device, which allocates nothing and follows the GPU's choices: caches of any size
cost nothing. Operators allocate beside this; csrc/launchers.h bounds what.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ems_vllm import ops
from ems_vllm.config import load_config, recipes
from ems_vllm.policies.context import CompactionContext
from ems_vllm.policies.coverage import Coverage
from ems_vllm.policies.policy import Policy
from ems_vllm.policies.rotation import Rotation

pytestmark = pytest.mark.slow

BLOCK_SIZE = 16
WORKSPACE = 64 << 20


class Allocations(TorchDispatchMode):
    """Bytes of the storages that tensors made inside of it hold: now, and at most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known = weakref.WeakSet()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        result = function(*args, **(kwargs or {}))
        known = {id(leaf.untyped_storage()) for leaf in tensors((args, kwargs))}
        for tensor in tensors(result):
            storage = tensor.untyped_storage()
            # A view, or written into: the storage of an argument.
            if id(storage) in known or storage in self._known:
                continue
            self._known.add(storage)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._free, storage.nbytes())
        return result

    def _free(self, num_bytes: int) -> None:
        self.now -= num_bytes


def tensors(values: Any) -> list[torch.Tensor]:
    return [v for v in torch.utils._pytree.tree_leaves(values) if isinstance(v, torch.Tensor)]


def meta_context(
    num_layers: int,
    num_rows: int,
    num_entries: int,
    budget: int,
    *,
    num_kv_heads: int = 8,
    head_size: int = 128,
    dtype: torch.dtype = torch.bfloat16,
) -> CompactionContext:
    """A context that has shapes only, every row of the same length."""
    with torch.device("meta"):
        columns = num_entries // BLOCK_SIZE
        shape = (num_layers, num_rows * columns + 1, num_kv_heads, BLOCK_SIZE)
        key_cache, value_cache = torch.empty((*shape, 2 * head_size), dtype=dtype).chunk(2, dim=-1)
        row = torch.empty(num_rows, dtype=torch.int32)
        table = torch.empty((num_rows, columns), dtype=torch.int32)
        ring = torch.empty((num_layers, num_rows, 16, 4 * num_kv_heads, head_size))
        return CompactionContext(
            key_cache=key_cache,
            value_cache=value_cache,
            block_table=table,
            num_entries=row,
            num_live=row,
            num_scored=row,
            budgets=row,
            num_protected=row,
            target_columns=row,
            num_represented=row,
            max_entries=num_entries,
            max_budget=budget,
            scale=1.0,
            accumulated_pages=torch.empty(shape),
            score_table=table,
            query_ring=ring,
            ring_rows=row,
            num_queries=row,
            end_positions=row,
            is_untouched=torch.empty(num_rows, dtype=torch.bool),
            rotations=[Rotation(torch.empty(num_entries, head_size), is_neox=True)] * num_layers,
            layer_ids=[0] * num_layers,
            output_weights=[torch.empty((1024, 4 * num_kv_heads * head_size))] * num_layers,
            num_merged=torch.empty((), dtype=torch.int64),
        )


@pytest.fixture(autouse=True)
def no_operators():
    """They only write into what they are given."""
    nothing = {name: lambda *args, **kwargs: None for name in ops.OPERATORS}
    with ops.implemented_by(SimpleNamespace(**nothing)):
        yield


def peak(policy: Policy, context: CompactionContext, budgets: Collection[int] = ()) -> int:
    """Most bytes while entries are scored, and placed by each budget: scores have nothing of it."""
    with torch.inference_mode(), Allocations() as allocations:
        scores = policy.score(context)
        for budget in budgets or [context.max_budget]:
            policy.place(replace(context, max_budget=budget), scores)
    return allocations.peak


# Parts that read entries in slices of bounded size take many steps here, and need no more for a
# larger cache: a few cases do, of a few layers.
SLICED = {"cake", "critical", "d2o", "dropkv", "expected_attention", "kvmerger", "lagkv", "rkv"}
SLICED |= {"triattention"}
SLICED_LAYERS = 4


def of(recipe: str) -> Policy:
    return Policy.from_config(load_config(recipe))


def is_sliced(policy: Policy) -> bool:
    return any(part.name() in SLICED for part in (policy.scorer, policy.selector, policy.merger))


def policies(with_sliced: bool = True) -> list[Any]:
    # Scorers pool alike; ems holds more beside it, and takes longest here.
    poolings = [
        {"recipe": recipe, "scorer": {"pooling": pooling, "kernel_size": 63}}
        for recipe, pooling in (("ems", "max"), ("snapkv", "avg"), ("snapkv", "forward"))
    ]
    names = recipes.names() + [f"{x['recipe']}-{x['scorer']['pooling']}" for x in poolings]
    settings = [{"recipe": recipe} for recipe in recipes.names()] + poolings
    # Compares pairs: fewer of them hold as much at a time.
    settings[names.index("rkv")] = {"recipe": "rkv", "scorer": {"span": 512}}
    # Merging holds most, and would hide what scoring does.
    merging = {"merger": {"name": "ems", "max_candidates_per_center": 16}}
    names += ["ems-not merged", "lagkv-long partitions"]
    settings.append({"recipe": "ems", "merger": {"name": "none"}})
    settings.append({"recipe": "lagkv", "scorer": {"lag": 512}})
    found = [Policy.from_config(load_config(merging | item)) for item in settings]
    return [
        pytest.param(policy, id=name)
        for policy, name in zip(found, names, strict=True)
        if with_sliced or not is_sliced(policy)
    ]


# Each number of kv_heads and each dtype with some lengths; many short rows take longest.
@pytest.mark.parametrize(
    ("num_rows", "num_entries", "num_kv_heads", "dtype"),
    [
        pytest.param(1, 32_768, 1, torch.bfloat16, id="long"),
        pytest.param(1, 32_768, 8, torch.float8_e4m3fn, id="long float8"),
        pytest.param(100, 64, 8, torch.bfloat16, id="short"),
        pytest.param(7, 1312, 8, torch.float32, id="some"),
    ],
)
@pytest.mark.parametrize("policy", policies())
def test_what_fits_the_workspace_stays_within(policy, num_rows, num_entries, num_kv_heads, dtype):
    per_layer = num_rows * num_entries
    most = policy.max_entries(WORKSPACE, num_kv_heads) // per_layer
    assert most >= 1
    if is_sliced(policy):
        most = min(most, SLICED_LAYERS)
    for num_layers in {1, most}:
        context = meta_context(
            num_layers, num_rows, num_entries, BLOCK_SIZE, num_kv_heads=num_kv_heads, dtype=dtype
        )
        used = peak(policy, context, budgets=(BLOCK_SIZE, num_entries - BLOCK_SIZE))
        assert used <= policy.workspace_bytes(num_layers * per_layer, num_kv_heads) <= WORKSPACE


@pytest.mark.parametrize(
    ("num_rows", "num_entries"), [(1, 32_768), (7, 1312)], ids=["long", "some"]
)
@pytest.mark.parametrize("policy", policies(with_sliced=False))
def test_what_protects_entries_stays_within_too(policy, num_rows, num_entries):
    per_layer, num_kv_heads = num_rows * num_entries, 8
    num_layers = policy.max_entries(WORKSPACE, num_kv_heads, protects=True) // per_layer
    assert num_layers >= 1
    context = meta_context(num_layers, num_rows, num_entries, BLOCK_SIZE)
    shape = (num_layers, num_rows, num_kv_heads, num_entries)
    with torch.inference_mode(), Allocations() as allocations:
        mask = torch.zeros(shape, dtype=torch.bool, device="meta")
        context = replace(context, is_protected=mask)
        scores = policy.score(context)
        for budget in (BLOCK_SIZE, num_entries - BLOCK_SIZE):
            policy.place(replace(context, max_budget=budget), scores)
    most = policy.workspace_bytes(num_layers * per_layer, num_kv_heads, protects=True)
    assert allocations.peak <= most <= WORKSPACE


@pytest.mark.parametrize("protects", [False, True])
@pytest.mark.parametrize(
    ("num_rows", "num_entries"), [(1, 32_768), (7, 1312)], ids=["long", "some"]
)
@pytest.mark.parametrize("policy", policies(with_sliced=False))
def test_what_a_coverage_counts_stays_within_too(policy, num_rows, num_entries, protects):
    policy = replace(policy, coverage=Coverage(0.9, BLOCK_SIZE))
    per_layer, num_kv_heads = num_rows * num_entries, 8
    num_layers = policy.max_entries(WORKSPACE, num_kv_heads, protects=protects) // per_layer
    assert num_layers >= 1
    context = meta_context(num_layers, num_rows, num_entries, BLOCK_SIZE)
    with torch.inference_mode(), Allocations() as allocations:
        if protects:
            shape = (num_layers, num_rows, num_kv_heads, num_entries)
            mask = torch.zeros(shape, dtype=torch.bool, device="meta")
            context = replace(context, is_protected=mask)
        scores = policy.score(context)
        policy.held_shares(context, scores)
        for budget in (BLOCK_SIZE, num_entries - BLOCK_SIZE):
            policy.place(replace(context, max_budget=budget), scores)
    most = policy.workspace_bytes(num_layers * per_layer, num_kv_heads, protects=protects)
    assert allocations.peak <= most <= WORKSPACE


@pytest.mark.parametrize("policy", policies(with_sliced=False))
def test_a_layer_beyond_the_workspace_stays_within_what_is_set_aside(policy):
    num_entries = 1 << 20
    assert policy.max_entries(WORKSPACE, 8) < num_entries
    context = meta_context(1, 1, num_entries, num_entries // 2, head_size=16)
    assert WORKSPACE < peak(policy, context) <= policy.workspace_bytes(num_entries, 8)


@pytest.mark.parametrize("recipe", [name for name in recipes.names() if is_sliced(of(name))])
def test_what_is_read_in_slices_stays_within_for_a_long_prompt(recipe):
    """A layer beyond the workspace, of several steps."""
    num_entries = 1 << 16
    scorer = {"scorer": {"span": 512}} if recipe == "rkv" else {}
    policy = Policy.from_config(load_config({"recipe": recipe, **scorer}))
    context = meta_context(1, 1, num_entries, num_entries // 2)
    assert peak(policy, context) <= policy.workspace_bytes(num_entries, 8)
