# SPDX-License-Identifier: Apache-2.0
"""How many operators a step calls: a launch each, and what a decoding step at batch 1 pays for.

That torch adds no others, nor waits for the GPU, is for tests/nullgpu to show.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from engine.arrivals import Arrival, serve
from engine.harness import engine, tokens

from ems_vllm.ops import implemented_by
from ems_vllm.ops.library import operators

NUM_LAYERS = 4
CHUNK, PROMPT_LEN, NUM_NEW = 64, 300, 40
SETTINGS = {
    "recipe": "ems",
    "budget": 32,
    "recent_window": 16,
    "recompress_interval": 16,
    "min_blocks_saved": 1,
}
# Of a step: the queries of each layer, inside of the graph, and the metadata.
DECODING = {"record_queries": NUM_LAYERS, "shift_block_tables": 1}
# Each on all layers, heads and requests that are due.
COMPACTING = {
    "score_window": 1,
    "vector_norms": 1,
    "key_moments": 1,
    "key_scores": 1,
    "rank_entries": 3,  # one of each order
    "select_entries": 1,
    "assign_classes": 1,
    "merge_compact": 1,
}


class CallCounter:
    """Stands for the compiled library, and counts, of score_queries also the tokens."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()

    def __getattr__(self, name: str) -> Any:
        operator = getattr(operators(), name)

        def run(*args: Any, **kwargs: Any) -> None:
            self.calls[name] += 1
            if name == "score_queries":
                self.calls["scored tokens"] += len(args[0])
            operator(*args, **kwargs)

        return run


@pytest.fixture(scope="module", params=[32, "all"])
def run(request):
    """The queries that score, and the calls of every step of two requests, one after the other."""
    settings = {**SETTINGS, "global_queries": request.param}
    counter, steps = CallCounter(), []
    with implemented_by(counter), engine(settings, max_num_batched_tokens=CHUNK) as probe:

        def note(_step: int) -> None:
            steps.append(counter.calls)
            counter.calls = Counter()

        # The first brings what only happens once.
        for seed in range(2):
            steps.clear()
            serve(probe, [Arrival(0, tokens(PROMPT_LEN, seed=seed), NUM_NEW)], note)
        steps.append(counter.calls)
    return request.param, steps[1:]


def test_only_chunks_with_queries_that_score_are_scored(run):
    global_queries, steps = run
    num_chunks = -(-PROMPT_LEN // CHUNK)
    scored = [step["score_queries"] for step in steps]
    num_before = 0 if global_queries == "all" else num_chunks - 1
    expected = [0] * num_before + [NUM_LAYERS] * (num_chunks - num_before)
    assert scored == expected + [0] * (len(steps) - num_chunks)
    num_scored = PROMPT_LEN if global_queries == "all" else global_queries
    assert sum(step["scored tokens"] for step in steps) == NUM_LAYERS * num_scored


def test_a_decoding_step_calls_one_operator_a_layer_and_one_for_all(run):
    _, steps = run
    decoding = [step for step in steps[-(-PROMPT_LEN // CHUNK) :] if not step["merge_compact"]]
    assert len(decoding) > NUM_NEW / 2
    for step in decoding:
        assert step <= Counter(DECODING)


def test_a_compaction_calls_operators_for_all_layers_at_once(run):
    _, steps = run
    compacting = [step for step in steps if step["merge_compact"]]
    # At the prompt's end, and every recompress_interval tokens.
    assert len(compacting) > NUM_NEW // SETTINGS["recompress_interval"]
    for step in compacting:
        assert step - Counter(DECODING) <= Counter(COMPACTING)
