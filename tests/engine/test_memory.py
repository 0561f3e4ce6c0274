# SPDX-License-Identifier: Apache-2.0
"""What is kept free beside the cache, by arithmetic."""

from collections import Counter
from contextlib import nullcontext

import pytest
import torch
from engine.vllm_imports import groups_of_uniform_page_size
from vllm.v1.kv_cache_interface import FullAttentionSpec

from ems_vllm.config import load_config, recipes
from ems_vllm.engine.attention.head_batch import HeadBatch, batch_bytes
from ems_vllm.engine.group.head_tables import HeadTables, page_start_bytes
from ems_vllm.engine.group.score_store import ScoreStore
from ems_vllm.engine.kv_cache_spec import CompressedAttentionSpec
from ems_vllm.engine.observation import ObservationSettings, score_tokens
from ems_vllm.engine.worker.memory import KERNEL_SCRATCH_BYTES, Footprint, merge_scratch_bytes
from ems_vllm.policies.policy import Policy

GIB = 1 << 30
# By the number of levels.
ALLOCATORS = {1: "uniform", 4: {"name": "pyramid", "num_levels": 4}}
# Layers, query heads and kv_heads of a rank, head size, and what is left for the cache beside the
# weights (bfloat16, 90 % of the card).
MODELS = {
    "Llama-3.1-8B, 80 GiB": (32, 32, 8, 128, 55.9),
    "Llama-3.1-8B, 24 GiB": (32, 32, 8, 128, 5.0),
    "Qwen3-32B, 141 GiB": (64, 64, 8, 128, 61.5),
    "Llama-3.3-70B, 4 x 80 GiB": (80, 16, 2, 128, 36.7),
    "Mistral-Small-24B, 80 GiB": (40, 32, 8, 128, 28.0),
}


def footprint(
    recipe="ems", layers=1, heads=32, kv_heads=8, head_size=128, max_model_len=131_072, **more
):
    config = load_config({"recipe": recipe, "budget": 1024, **more})
    policy = Policy.from_config(config)
    plain = FullAttentionSpec(
        block_size=16, num_kv_heads=kv_heads, head_size=head_size, dtype=torch.bfloat16
    )
    observation = ObservationSettings(
        obs_window=config.obs_window if policy.scorer.uses_window else 0,
        score_tokens=score_tokens(None, max_model_len, 8192)
        if policy.scorer.uses_accumulated
        else None,
        ring_rows=config.query_ring_rows,
    )
    settings = config.plan_settings_of(layers)
    names = [f"layer {index}" for index in range(layers)]
    specs = {
        name: CompressedAttentionSpec.compress(plain, settings.for_layer(index), observation)
        for index, name in enumerate(names)
    }
    return Footprint(
        config=config,
        policy=policy,
        max_model_len=max_model_len,
        # vLLM's default on a data-center GPU.
        max_num_seqs=1024,
        max_num_reqs=1024,
        query_itemsize=2,
        num_heads=dict.fromkeys(names, heads),
        specs=specs,
    )


def page_bytes(sizes):
    """Bytes of a block: those of the layers of a group, where all have as many."""
    pages = Counter()
    for spec in sizes.specs.values():
        pages[spec] += spec.page_size_bytes
    (page,) = set(pages.values())
    return page


def workspace(recipe, max_model_len, kv_heads=8):
    sizes = footprint(recipe, kv_heads=kv_heads, max_model_len=max_model_len)
    return sizes.workspace_bytes - KERNEL_SCRATCH_BYTES


# Where kv_heads keep different numbers of entries, each may have those of several; profiles that
# ship are of another model.
ALIKE = [
    name
    for name in recipes.names()
    if not (load_config(name).allocator.deals_to_heads or load_config(name).allocator.reads_profile)
]


@pytest.mark.parametrize("recipe", ALIKE)
def test_the_workspace_has_room_for_a_layer_of_the_longest_request(recipe):
    policy = Policy.from_config(load_config(recipe))
    assert workspace(recipe, 32_768) == 64 << 20
    assert (
        workspace(recipe, 1 << 20) == policy.workspace_bytes(1 << 20, 8, protects=True) > 64 << 20
    )
    # Tensor parallelism: a rank has a share of the kv_heads.
    assert workspace(recipe, 131_072, kv_heads=1) == 64 << 20


@pytest.mark.parametrize("levels", [1, 4])
@pytest.mark.parametrize("name", MODELS)
def test_the_query_ring_is_a_small_share_of_the_cache(name, levels):
    *shape, gib = MODELS[name]
    sizes = footprint("ems", *shape, allocator=ALLOCATORS[levels])
    available = int(gib * GIB)
    cache = sizes.reduce(available)
    page = page_bytes(sizes)
    num_blocks = cache // page
    # Everything fits, and not a block more would.
    assert cache + sizes.total_bytes(num_blocks) <= available
    assert cache + page + sizes.total_bytes(num_blocks + 1) > available
    assert sizes.ring_bytes(num_blocks) < 0.01 * cache
    # Half as many again may record at a time as decoding requests do on average.
    (spec, *_) = sizes.specs.values()
    held = num_blocks / levels * 16 / (1024 + 64 + 256)
    assert spec.num_ring_rows(num_blocks, 1024) >= 1.5 * held * 16 / 256


@pytest.mark.parametrize("name", MODELS)
def test_levels_take_no_more_beside_the_same_cache(name):
    """A block id belongs to one group at a time, so the scores of groups share their bytes."""
    *shape, gib = MODELS[name]
    alike, levels = (footprint("ems", *shape, allocator=ALLOCATORS[n]) for n in (1, 4))
    assert page_bytes(alike) == 4 * page_bytes(levels)
    num_blocks = int(gib * GIB) // page_bytes(alike)
    assert levels.score_bytes(4 * num_blocks) <= alike.score_bytes(num_blocks)
    assert levels.ring_bytes(4 * num_blocks) <= 1.01 * alike.ring_bytes(num_blocks)
    assert levels.reduce(int(gib * GIB)) >= 0.999 * alike.reduce(int(gib * GIB))


# 32 = 4 x 8; 30 = 7 + 8 + 7 + 8, which vLLM pads; 11 = 2 + 3 + 3 + 3, which it splits.
@pytest.mark.parametrize("layers", [32, 30, 11])
def test_scores_take_what_is_set_aside_for_them(layers):
    """Also where levels differ in size, and a block has the bytes of the smallest or largest."""
    sizes = footprint("ems", layers, allocator=ALLOCATORS[4])
    groups = groups_of_uniform_page_size(sizes.specs)
    # A block of each group for every 16 tokens of the longest prompt.
    num_blocks = len(groups) * 131_072 // 16
    with torch.device("meta"):
        store = ScoreStore(
            [group.kv_cache_spec for group in groups],
            [len(group.layer_names) for group in groups],
            num_blocks,
            torch.device("meta"),
            nullcontext(),
        )
    held = sum(scores.nbytes for scores in store._scores.values())
    assert held <= sizes.score_bytes(num_blocks)
    # What a block takes in vLLM is at least what the size of the cache was found with.
    largest = max(len(group.layer_names) for group in groups)
    most = Counter(sizes.specs.values()).most_common()
    assert largest >= most[-1][1]


def test_rows_can_be_set():
    one, few = (footprint("snapkv", query_ring_rows=rows).ring_bytes(10_000) for rows in (1, 8))
    assert few == 8 * one == 8 * 16 * 32 * 128 * 2


@pytest.mark.parametrize(
    ("rows", "max_budget", "max_merges", "head_size", "itemsize", "expected"),
    [
        # Groups that fit are staged several at a time.
        (8, 1024, 1024, 128, 2, 32 << 20),
        (1, 0, 0, 64, 4, 32 << 20),
        # Keys and values, scores, members, starts of classes and of none.
        (8, 16_384, 4096, 128, 2, 8 * (16_384 * (512 + 4) + 4096 * 4 + 16_384 * 4 + 16)),
        # Beyond 4096 members the sort of 8 bytes each, up to a power of two.
        (
            8,
            16_384,
            4097,
            128,
            2,
            8 * (16_384 * (512 + 4) + 4097 * 4 + 12 + 16_384 * 4 + 16 + 8192 * 8),
        ),
        # One row of one kv_head may exceed the limit too: (65_537 + 1) * 4 = 262_152, and 8 more.
        (1, 65_537, 3, 256, 1, 65_537 * 512 + 262_148 + 12 + 12 + 4 + 262_152 + 8),
    ],
)
def test_scratch_memory_of_rows_that_are_merged_together(
    rows, max_budget, max_merges, head_size, itemsize, expected
):
    """item_scratch of csrc/cuda/merge_compact.cu, by hand, in parts that are multiples of 16."""
    assert merge_scratch_bytes(rows, max_budget, max_merges, head_size, itemsize) == expected


def by_head(layers, heads):
    """An allocator by which heads keep unequal numbers."""
    names = range(layers)
    parts = [[0.25 if head % 2 else 0.75] for head in range(heads)]
    profile = {
        "ratios": [0.5],
        "fractions": {name: [0.5] for name in names},
        "head_fractions": dict.fromkeys(names, parts),
    }
    return {"name": "profile", "profile": profile, "per_head": True, "num_levels": 1}


def test_tables_of_heads_take_what_is_set_aside_for_them():
    meta, num_layers, num_heads, num_columns = torch.device("meta"), 3, 8, 100
    tables = HeadTables(num_layers, num_heads, 20, meta)
    assert tables.page_starts.nbytes == num_layers * page_start_bytes(20, num_heads)
    live = torch.zeros((24, num_columns), dtype=torch.int32, device=meta)
    batch = HeadBatch(tables, 16, live, live[:, 0])
    held = [value for value in vars(batch).values() if isinstance(value, torch.Tensor)]
    own = sum(tensor.nbytes for tensor in held) - live.nbytes - live[:, 0].nbytes
    assert own == batch_bytes(24, num_columns, num_heads)


@pytest.mark.parametrize("allocator", [by_head(2, 8), "ada"], ids=["profile", "ada"])
def test_unequal_heads_are_counted(allocator):
    """A request of a million tokens whose heads may each keep all of them."""
    alike = footprint("ems", 2, max_model_len=1 << 20)
    heads = footprint("ems", 2, max_model_len=1 << 20, allocator=allocator)
    assert alike.head_bytes(1000) == 0
    policy = heads.policy
    staged = merge_scratch_bytes(8, 1 << 20, 1 << 20, 128, 2)
    assert heads.workspace_bytes == policy.workspace_bytes(8 << 20, 1, protects=True) + staged
    tables = batch_bytes(1024, (1 << 20) // 16, 8) + 2 * page_start_bytes(1024, 8)
    # The queries of a layer are put in the order of its heads.
    assert heads.head_bytes(1000) == tables + heads.ring_bytes(1000) // 2
    grows = heads.score_bytes(1000) + heads.ring_bytes(1000) + heads.head_bytes(1000)
    assert heads.total_bytes(1000) == heads.workspace_bytes + grows


def test_a_request_that_is_bounded_needs_no_room_for_its_length():
    bounded = {"prefill_interval": 512, "allow_off": False}
    usual = footprint(max_model_len=1 << 20, workspace_mib=1)
    found = footprint(max_model_len=1 << 20, workspace_mib=1, **bounded)
    assert found.workspace_bytes < usual.workspace_bytes / 5
    # Whoever may switch compression off may be as long as any.
    may_be_off = footprint(max_model_len=1 << 20, workspace_mib=1, prefill_interval=512)
    assert may_be_off.workspace_bytes == usual.workspace_bytes
    entries = [
        next(iter(one.specs.values())).settings.most_entries(16, 1 << 20)
        for one in (usual, found, may_be_off)
    ]
    assert entries[0] == entries[2] == 1 << 20
    assert 1024 + 2 * 512 < entries[1] < 2 * (1024 + 512)


def test_room_for_what_measures_is_kept_where_requests_are_measured():
    shape = (80, 64, 8, 128)
    plain, measuring = (footprint("ems", *shape, guard_share=share) for share in (0.0, 0.05))
    # A slice of entries, and the outputs of 16 queries in all layers.
    expected = (32 << 20) + 80 * 16 * 64 * 128 * 4
    assert measuring.workspace_bytes - plain.workspace_bytes == expected
