# SPDX-License-Identifier: Apache-2.0
"""The engine on transformers where kv_heads share what their layer keeps: each its own number."""

import pytest
import torch
from eval.test_transformers_levels import COMPRESSION, CONTINUATION, NUM_LAYERS, PROMPT, start
from eval.test_transformers_levels import engine as engine
from unlike_heads import unlike_heads

from ems_vllm.config import RequestOptions, load_config
from ems_vllm.ops import reference_operators

pytestmark = pytest.mark.slow

HALF, BLOCK = 0.5, 16
NEVER = RequestOptions(enabled=False)


def by_head(of_heads, num_levels=1):
    """A profile in which every layer keeps a half, and its heads what they are given."""
    layers = range(NUM_LAYERS)
    return {
        "name": "profile",
        "profile": {
            "ratios": [HALF],
            "fractions": {layer: [HALF] for layer in layers},
            "head_fractions": {layer: [[part] for part in of_heads(layer)] for layer in layers},
        },
        "uniform_share": 0,
        "num_levels": num_levels,
        "per_head": True,
    }


EQUAL = by_head(lambda layer: (HALF, HALF))
# What one head keeps in one layer, the other one keeps in the next.
UNEQUAL = by_head(lambda layer: (0.125, 0.875) if layer % 2 else (0.875, 0.125))


# By the scores of each compaction; with a safeguard of 1 all heads get as much.
ADA = {"name": "ada", "safeguard": 0.0}
ALIKE = {"name": "ada", "safeguard": 1.0}


def live(request):
    """By layer and head, keys and values without gaps."""
    gaps = request.gaps()
    found = []
    for layer, (keys, values) in enumerate(zip(*request.entries(), strict=True)):
        starts = gaps[layer].tolist() if layer in gaps else [0] * len(keys)
        found.append([(k[at:], v[at:]) for k, v, at in zip(keys, values, starts, strict=True)])
    return found


@pytest.mark.parametrize(
    "equal", [EQUAL, {**EQUAL, "num_levels": 2}, ALIKE], ids=["1 level", "2 levels", "ada"]
)
@pytest.mark.parametrize("recipe", ["ems", "h2o", "snapkv", "knorm"])
def test_equal_shares_are_uniform_bit_for_bit(engine, recipe, equal):
    one, other = (start(engine, each, recipe=recipe) for each in ("uniform", equal))
    with reference_operators():
        torch.testing.assert_close(
            one.extend(CONTINUATION[:150]), other.extend(CONTINUATION[:150]), rtol=0, atol=1e-5
        )
    for own, its in zip(live(one), live(other), strict=True):
        for mine, theirs in zip(own, its, strict=True):
            for first, second in zip(mine, theirs, strict=True):
                torch.testing.assert_close(first, second, rtol=0, atol=1e-5)


@pytest.mark.parametrize("recipe", ["ems", "h2o"])
def test_each_head_keeps_what_it_is_dealt(engine, recipe):
    """35 whole blocks, of which 4 are kept in a layer: 8 pages for two heads."""
    request = start(engine, UNEQUAL, recipe=recipe, global_queries="all")
    with reference_operators():
        request.compress()
        pages = {0: (7, 1), 1: (1, 7)}
        for layer, of_layer in enumerate(live(request)):
            held = tuple(len(keys) for keys, _ in of_layer)
            assert held == tuple(40 + BLOCK * count for count in pages[layer % 2])
        assert request.num_live == 40 + 4 * BLOCK
        # At the prompt's end a head keeps what it would if all others kept as many.
        for count in (1, 7):
            alike = start(
                engine, "uniform", recipe=recipe, budget=count * BLOCK, global_queries="all"
            )
            alike.compress()
            for layer, (own, its) in enumerate(zip(live(request), live(alike), strict=True)):
                head = pages[layer % 2].index(count)
                for mine, theirs in zip(own[head], its[head], strict=True):
                    torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("recipe", ["ems", "snapkv"])
def test_heads_are_dealt_to_by_their_scores_at_every_compaction(engine, recipe):
    request, num_processed = start(engine, ADA, recipe=recipe), len(PROMPT)
    with reference_operators(), unlike_heads() as dealt:
        for _ in range(3):
            dealt.clear()
            request.compress()
            assert len(dealt) == NUM_LAYERS
            for (pages,), of_layer in zip(dealt, live(request), strict=True):
                assert sum(pages) == 2 * 4
                assert pages[0] < pages[1]
                tail = request.num_live - 64
                assert [len(keys) - tail for keys, _ in of_layer] == [BLOCK * n for n in pages]
            due = request.next_compaction()
            request.extend(CONTINUATION[: due - num_processed])
            num_processed = due


@pytest.mark.parametrize("allocator", [UNEQUAL, ADA], ids=["profile", "ada"])
def test_tokens_at_once_are_tokens_one_by_one(engine, allocator):
    """Through three compactions, of pages that heads already own."""
    at_once, by_step = (start(engine, allocator) for _ in range(2))
    with reference_operators(), unlike_heads():
        logits = at_once.extend(CONTINUATION[:160])
        steps = torch.stack([by_step.step(token) for token in CONTINUATION[:160]])
    torch.testing.assert_close(logits, steps, rtol=0, atol=1e-4)
    for of_layer in live(at_once):
        assert sum(len(keys) for keys, _ in of_layer) == 2 * at_once.num_live
        assert len(of_layer[0][0]) != len(of_layer[1][0])


def test_a_request_that_is_not_compressed_has_no_heads_to_deal_to(engine):
    config = load_config({**COMPRESSION, "allocator": UNEQUAL})
    prefilled = engine.prefill(PROMPT, config.obs_window, [])
    full, alike = (
        engine.request(prefilled, load_config({**COMPRESSION, "allocator": each}), NEVER)
        for each in (UNEQUAL, "uniform")
    )
    assert torch.equal(full.extend(CONTINUATION[:20]), alike.extend(CONTINUATION[:20]))
    assert full.gaps() == {}


def test_gaps_are_never_attended_to(engine):
    clean, filled = (start(engine, UNEQUAL) for _ in range(2))
    with reference_operators():
        for request in (clean, filled):
            request.compress()
    with torch.inference_mode():
        for layer, (keys, values) in enumerate(zip(*filled.entries(), strict=True)):
            for head, gap in enumerate(filled.gaps()[layer].tolist()):
                keys[head, :gap], values[head, :gap] = 1e4, 1e4
    # Not as far as the next compaction.
    assert torch.equal(clean.extend(CONTINUATION[:9]), filled.extend(CONTINUATION[:9]))
    assert torch.equal(clean.step(CONTINUATION[9]), filled.step(CONTINUATION[9]))
