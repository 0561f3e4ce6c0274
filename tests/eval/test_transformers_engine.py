# SPDX-License-Identifier: Apache-2.0
"""The engine and a second implementation, on transformers, keep the same and answer the same.

Both compute in float32 and differ by about 1e-5 in keys and values (sums in another order), so
they can part only where two scores or two logits come closer than that. None do here; on another
machine one prompt may, and everything after that differs. Hence all prompts but one must agree in
every token and every entry. A mistake in the engine, wherever it is, shows in all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any
from unittest import mock

import pytest
import torch
from engine.harness import LLAMA, QUERY_HEADS, engine, tokens

from ems_vllm.config import KVCompressionConfig, RequestOptions, load_config
from ems_vllm.eval.transformers_engine.answer import generated
from ems_vllm.eval.transformers_engine.engine import TransformersEngine
from ems_vllm.ops import KeyMerge, reference_operators
from ems_vllm.policies.context import CompactionContext
from ems_vllm.policies.policy import Policy

pytestmark = pytest.mark.slow

# The first is too short to be compressed before it has written much; the others are compressed at
# the prompt's end. All are compressed again while decoding.
PROMPTS = [tokens(length, seed=length) for length in (30, 300, 421)]
MAX_TOKENS = 56
NUM_COMPACTIONS = (1, 5, 4)
COMPRESSION = {
    "budget": 32,
    "recent_window": 16,
    "recompress_interval": 16,
    "min_blocks_saved": 1,
}
RECIPES: dict[str, dict[str, Any]] = {
    "knorm": {"recipe": "knorm"},
    "snapkv": {"recipe": "snapkv"},
    # Keys of a random model resemble each other little; at 0 whatever is a candidate is merged.
    "ems": {"recipe": "ems", "merger": {"similarity_threshold": 0.0}},
    "ems, one query in 4": {
        "recipe": "ems",
        "global_queries": "all",
        "sample_stride": 4,
        "merger": {"similarity_threshold": 0.0},
    },
    "ems in levels": {
        "recipe": "ems",
        "merger": {"similarity_threshold": 0.0},
        "allocator": {"name": "pyramid", "num_levels": 2},
    },
    # Of all heads of a layer; by output projections; by positions; and mergers of their own.
    "tova": {"recipe": "tova", "selector": "chunks"},
    "criticalkv": {"recipe": "criticalkv"},
    "compresskv": {
        "recipe": "compresskv",
        "scorer": {"profile": QUERY_HEADS},
        "allocator": "uniform",
    },
    "expected_attention": {"recipe": "expected_attention", "obs_window": 16},
    "triattention": {"recipe": "triattention", "obs_window": 16, "merger": "cam"},
    "kvmerger": {"recipe": "kvmerger"},
    "d2o": {"recipe": "d2o"},
}
# Each level of layers is compacted on its own.
NUM_LEVELS = {"ems in levels": 2}


@dataclass
class Compaction:
    """What one compaction wrote, [num_layers, num_kv_heads, budget, head_size]."""

    keys: torch.Tensor
    values: torch.Tensor
    num_merged: int


@dataclass
class Run:
    """One request: its tokens and its compactions."""

    token_ids: list[int] = field(default_factory=list)
    compactions: list[Compaction] = field(default_factory=list)

    def agrees_with(self, other: Run) -> bool:
        return self.token_ids == other.token_ids and all(
            torch.allclose(mine.keys, theirs.keys, atol=1e-3)
            and torch.allclose(mine.values, theirs.values, atol=1e-3)
            for mine, theirs in zip(self.compactions, other.compactions, strict=True)
        )


def stored(
    cache: torch.Tensor, context: CompactionContext, first: int, num_entries: int
) -> torch.Tensor:
    """Entries of the only row from a column on, [num_layers, num_kv_heads, num_entries, ...]."""
    columns = context.block_table[0, first : first + num_entries // context.block_size].long()
    return cache[:, columns].transpose(1, 2).flatten(2, 3).clone()


def written(cache: torch.Tensor, context: CompactionContext) -> torch.Tensor:
    """What the compaction of the only row left in its target columns."""
    return stored(cache, context, int(context.target_columns[0]), int(context.budgets[0]))


@contextmanager
def recorded(run: Run) -> Iterator[None]:
    """Note every compaction in this process."""
    compact = Policy.compact

    def recording(self: Policy, context: CompactionContext) -> None:
        before = stored(context.key_cache, context, 0, context.max_entries)[:, :, None]
        compact(self, context)
        keys = written(context.key_cache, context)
        unchanged = (keys[:, :, :, None] == before).all(-1).any(-1)
        num_merged = int((~unchanged).sum())
        run.compactions.append(Compaction(keys, written(context.value_cache, context), num_merged))

    with mock.patch.object(Policy, "compact", recording):
        yield


def engine_runs(settings: dict[str, Any]) -> list[Run]:
    runs = []
    with engine(settings) as probe:
        for prompt in PROMPTS:
            run = Run()
            with recorded(run):
                (run.token_ids,) = probe.generate([prompt], MAX_TOKENS)
            runs.append(run)
    return runs


def transformers_runs(model: TransformersEngine, config: KVCompressionConfig) -> list[Run]:
    runs = []
    for prompt in PROMPTS:
        run = Run()
        scored = model.scored_queries(len(prompt), config, RequestOptions())
        needed = [] if scored is None else [scored]
        prefilled = model.prefill(prompt, config.obs_window, needed)
        request = model.request(prefilled, config, RequestOptions())
        with recorded(run), reference_operators():
            run.token_ids = list(islice(generated(prefilled.logits, request.step), MAX_TOKENS))
        runs.append(run)
    return runs


@pytest.fixture(scope="module")
def model():
    return TransformersEngine.load(LLAMA, device="cpu", dtype="float32")


def counts(runs: Sequence[Run]) -> tuple[int, ...]:
    return tuple(len(run.compactions) for run in runs)


@pytest.mark.parametrize("name", RECIPES)
def test_both_engines_keep_the_same_and_answer_the_same(name, model):
    settings = {**RECIPES[name], **COMPRESSION}
    config = load_config(settings)
    ours, theirs = engine_runs(settings), transformers_runs(model, config)
    expected = tuple(count * NUM_LEVELS.get(name, 1) for count in NUM_COMPACTIONS)
    assert counts(ours) == counts(theirs) == expected
    disagreeing = [
        len(prompt)
        for prompt, run, other in zip(PROMPTS, ours, theirs, strict=True)
        if not run.agrees_with(other)
    ]
    assert len(disagreeing) <= 1, f"prompts of {disagreeing} tokens"
    num_merged = sum(item.num_merged for run in theirs for item in run.compactions)
    changes_keys = config.merger.keeps_mass or config.merger.key_merge != KeyMerge.CENTRE
    assert (num_merged > 1000) == changes_keys
