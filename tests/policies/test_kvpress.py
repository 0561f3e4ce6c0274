# SPDX-License-Identifier: Apache-2.0
"""What our methods keep, beside what NVIDIA kvpress keeps of the same inputs.

`benchmarks/peers/record_indices.py` wrote down what kvpress keeps (kvpress.json); inputs are made
anew (kvpress_inputs.py). kvpress counts its window as part of the budget; here it is the tail,
which is kept beside it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from policies import kvpress_inputs as inputs
from policies.contexts import heads_as_rows
from torch import Tensor

from ems_vllm.config import load_config
from ems_vllm.config.schema import KVCompressionConfig
from ems_vllm.policies.context import CompactionContext
from ems_vllm.policies.policy import Policy
from ems_vllm.policies.rotation import Rotation

WINDOW, NUM_TOKENS, LAYERS = inputs.WINDOW, inputs.NUM_TOKENS, range(inputs.NUM_LAYERS)
ROTATION = Rotation(inputs.cos_sin(), is_neox=True)
# Of (layer, kv_head, position).
AGREEMENT = 0.99


class Case(NamedTuple):
    """A method.

    Attributes:
        settings: Ours.
        tail: Last tokens that are always kept.
        num_queries: Recorded ones.
        num_sinks: First tokens that are always kept.
    """

    settings: dict[str, Any]
    tail: int = 0
    num_queries: int = WINDOW
    num_sinks: int = 0


SNAPKV: dict[str, Any] = {"recipe": "snapkv"}
EXPECTED: dict[str, Any] = {"recipe": "expected_attention"}
# kvpress leaves the sinks' queries out.
ALL_QUERIES = NUM_TOKENS - inputs.NUM_SINKS
CASES = {
    "knorm": Case({"recipe": "knorm"}),
    "keydiff": Case({"recipe": "keydiff"}),
    "snapkv": Case(SNAPKV, tail=WINDOW),
    "tova": Case({"recipe": "tova"}, tail=1),
    "streaming_llm": Case({"recipe": "streaming_llm"}, num_sinks=4),
    "expected_attention": Case(EXPECTED, num_queries=ALL_QUERIES, num_sinks=4),
    "expected_attention 0.01": Case(
        {**EXPECTED, "scorer": {"epsilon": 0.01}}, num_queries=ALL_QUERIES, num_sinks=4
    ),
    "lagkv 32": Case({"recipe": "lagkv", "scorer": {"lag": 32}}, num_sinks=4),
    "chunkkv snapkv": Case(
        {"recipe": "chunkkv", "scorer": {"kernel_size": 5}, "selector": {"chunk_length": 16}},
        tail=WINDOW,
    ),
}


def build(case: Case, budget: int, layers: range = LAYERS) -> CompactionContext:
    """Pages of one entry, behind which what is kept goes."""
    of_layers = [inputs.layer(index) for index in layers]
    num_entries = NUM_TOKENS - case.tail
    kept = budget - case.tail

    def pages(vectors: list[Tensor]) -> Tensor:
        # [num_layers, num_blocks, num_kv_heads, 1, head_size]
        filled = torch.stack(vectors).transpose(1, 2).unsqueeze(3)
        return torch.cat([filled, torch.full_like(filled[:, :kept], torch.nan)], dim=1)

    newest = torch.arange(NUM_TOKENS - case.num_queries, NUM_TOKENS)
    cos_sin = ROTATION.at(newest)[:, None]
    turned = [ROTATION.turn(of_layer.queries[newest], cos_sin) for of_layer in of_layers]
    ring = torch.empty_like(torch.stack(turned))
    ring[:, newest % case.num_queries] = torch.stack(turned)
    ints = lambda value: torch.tensor([value], dtype=torch.int32)  # noqa: E731
    key_cache = pages([of_layer.keys for of_layer in of_layers])
    table = torch.arange(NUM_TOKENS + kept, dtype=torch.int32)[None]
    return CompactionContext(
        key_cache=key_cache,
        value_cache=pages([of_layer.values for of_layer in of_layers]),
        block_table=table,
        num_entries=ints(num_entries),
        num_live=ints(NUM_TOKENS),
        num_scored=ints(0),
        budgets=ints(kept),
        num_protected=ints(case.num_sinks),
        target_columns=ints(NUM_TOKENS),
        num_represented=ints(0),
        max_entries=num_entries,
        max_budget=kept,
        scale=inputs.HEAD_SIZE**-0.5,
        accumulated_pages=torch.zeros_like(key_cache[..., 0]),
        score_table=table,
        query_ring=ring[:, None],
        ring_rows=ints(0),
        num_queries=ints(case.num_queries),
        end_positions=ints(NUM_TOKENS),
        is_untouched=torch.tensor([True]),
        rotations=[ROTATION] * len(layers),
        output_weights=[of_layer.output_weight for of_layer in of_layers],
    )


def config(settings: dict[str, Any]) -> KVCompressionConfig:
    loaded = load_config({"budget": 64, **settings})
    assert loaded is not None
    return loaded


def kept_by(case: Case, context: CompactionContext) -> Tensor:
    """[num_layers, num_kv_heads, NUM_TOKENS], bool."""
    kept_idx = Policy.from_config(config(case.settings)).compact(context)
    return mask_of(case, kept_idx.flatten(1, 2))


def mask_of(case: Case, kept_idx: Tensor) -> Tensor:
    found = torch.zeros((*kept_idx.shape[:2], NUM_TOKENS + 1), dtype=torch.bool)
    found.scatter_(-1, torch.where(kept_idx < 0, NUM_TOKENS, kept_idx).long(), True)
    found = found[..., :NUM_TOKENS]
    found[..., NUM_TOKENS - case.tail :] = True
    return found


def agreement(found: Tensor, expected: Tensor) -> float:
    return (found == expected).float().mean().item()


@pytest.mark.parametrize("budget", inputs.BUDGETS)
@pytest.mark.parametrize("name", CASES)
def test_the_same_entries_stay(name, budget):
    found = kept_by(CASES[name], build(CASES[name], budget))
    assert (found.sum(-1) == budget).all()
    assert agreement(found, inputs.kept(name, budget)) >= AGREEMENT


@pytest.mark.parametrize("budget", inputs.BUDGETS)
def test_pyramidkv(budget):
    """Layers share as there, and of as many entries the same ones stay."""
    expected = inputs.kept("pyramidkv 4", budget)
    counts = expected.sum(-1)[:, 0]
    allocator = config({"recipe": "pyramidkv", "allocator": {"beta": 4}}).allocator
    shares = allocator.shares(inputs.NUM_LAYERS)
    by_layer = {layer: level for level, of in enumerate(shares.levels) for layer in of}
    fractions = [shares.fractions[by_layer[layer]][0] / shares.ratios[0] for layer in LAYERS]
    assert [fraction * budget for fraction in fractions] == pytest.approx(counts.tolist(), abs=1)
    for layer in LAYERS:
        case = CASES["snapkv"]
        found = kept_by(case, build(case, int(counts[layer]), range(layer, layer + 1)))
        assert agreement(found[0], expected[layer]) >= AGREEMENT


@pytest.mark.parametrize("budget", inputs.BUDGETS)
def test_criticalkv(budget):
    # Of kvpress' first half, the window is a part.
    first = (budget // 2 - WINDOW) / (budget - WINDOW)
    selector = {"first_share": first, "epsilon": 1e-4 * WINDOW}
    case = Case({"recipe": "criticalkv", "selector": selector}, tail=WINDOW)
    found = kept_by(case, build(case, budget))
    expected = inputs.kept("criticalkv snapkv", budget)
    assert agreement(found, expected) >= AGREEMENT
    # The control: by scores alone others stay.
    assert agreement(inputs.kept("snapkv", budget), expected) < AGREEMENT


@pytest.mark.parametrize("budget", inputs.BUDGETS)
@pytest.mark.parametrize("name", ["adakv snapkv", "adakv snapkv 0"])
def test_adakv(name, budget):
    # kvpress' safe entries are those of a budget with the window, which is among them.
    safe = 0 if name.endswith(" 0") else max(0, int(0.2 * budget) - WINDOW)
    safeguard = (safe + 0.5) / (budget - WINDOW) if safe else 0.0
    allocator = {"name": "ada", "rule": "floor", "safeguard": safeguard}
    case = Case({"recipe": "snapkv", "allocator": allocator}, tail=WINDOW)
    policy = Policy.from_config(config(case.settings))
    found = []
    for layer in LAYERS:
        context = heads_as_rows(build(case, budget, range(layer, layer + 1)))
        scores = policy.score(context)
        pages = policy.allocator.deal(context, scores, [budget - WINDOW])
        kept = [
            scores.weights[0, head, 0].topk(int(count)).indices
            for head, count in enumerate(pages[0])
        ]
        mask = torch.zeros((inputs.NUM_KV_HEADS, NUM_TOKENS), dtype=torch.bool)
        for of_head, index in zip(mask, kept, strict=True):
            of_head[index] = True
        mask[:, NUM_TOKENS - WINDOW :] = True
        found.append(mask)
    expected = inputs.kept(name, budget)
    assert torch.stack(found).sum((1, 2)).tolist() == expected.sum((1, 2)).tolist()
    assert agreement(torch.stack(found), expected) >= AGREEMENT
