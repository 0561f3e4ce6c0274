# SPDX-License-Identifier: Apache-2.0
"""A chat whose prompt is the conversation so far: each turn hits what the rules allow it to."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import pytest
from engine.harness import BLOCK_SIZE, engine, tokens

pytestmark = pytest.mark.slow

BUDGET, RECENT_WINDOW = 64, 32
COMPRESSION = {
    "recipe": "knorm",
    "budget": BUDGET,
    "recent_window": RECENT_WINDOW,
    "recompress_interval": 64,
    "min_blocks_saved": 1,
}


@dataclass(frozen=True)
class Turn:
    """A turn of the chat.

    Attributes:
        num_user_tokens: What the user adds to the conversation.
        num_answer_tokens: What the model answers.
        prompt_len: Length of the whole prompt, which the former two determine.
        num_cached: The longest hit that docs/architecture.md allows.
    """

    num_user_tokens: int
    num_answer_tokens: int
    prompt_len: int
    num_cached: int


# A prompt is compressed from 112 tokens on: t = (112 - 32) // 16 = 5, a = t - 4 = 1.
TURNS = (
    Turn(40, 30, 40, 0),
    # Never compressed, so all that was computed of the first turn is shared: 69 tokens.
    Turn(25, 140, 95, 64),
    # The long answer was compressed while it grew, so of the second turn only the prompt is
    # shared, 95 tokens; this one is compressed after its prompt, from column 9 on.
    Turn(20, 30, 255, 80),
    # The third turn shared its columns before the ninth.
    Turn(100, 20, 385, 144),
    # The fourth one those before the eighteenth: (385 - 32) // 16 - 4.
    Turn(60, 20, 465, 288),
    # And the fifth one those before the twenty-third.
    Turn(90, 20, 575, 368),
)


def converse(enable_prefix_caching):
    """Answers and hits of a chat with the turns above."""
    conversation, answers, hits = [], [], []
    options = {"enable_prefix_caching": enable_prefix_caching, "max_model_len": 1024}
    with engine(COMPRESSION, **options) as probe:
        for seed, turn in enumerate(TURNS):
            conversation = conversation + tokens(turn.num_user_tokens, seed=seed)
            assert len(conversation) == turn.prompt_len
            (output,) = probe.generate_outputs([conversation], turn.num_answer_tokens)
            answers.append(list(output.outputs[0].token_ids))
            hits.append(output.num_cached_tokens)
            conversation = conversation + answers[-1]
            probe.assert_pool_is_empty()
        compactions = probe.stats()["num_compactions"]
    return answers, hits, compactions


def test_turns_follow_the_rules():
    """The figures of the table above, once more from the rules alone."""
    shared = 0
    for previous, turn in pairwise(TURNS):
        shared = max(shared, _shared_by(previous))
        assert turn.num_cached == min(shared, _longest_hit(turn.prompt_len))


def _first_column(prompt_len):
    return (prompt_len - RECENT_WINDOW) // BLOCK_SIZE - BUDGET // BLOCK_SIZE


def _longest_hit(prompt_len):
    first = _first_column(prompt_len)
    # A prompt that is not compressed may be hit whole, but for the last token.
    return (first if first > 0 else (prompt_len - 1) // BLOCK_SIZE) * BLOCK_SIZE


def _shared_by(turn):
    if _first_column(turn.prompt_len) > 0:
        return _first_column(turn.prompt_len) * BLOCK_SIZE
    # The last token of an answer is never computed.
    length = turn.prompt_len + turn.num_answer_tokens - 1
    was_compressed = turn is TURNS[1]
    return (turn.prompt_len if was_compressed else length) // BLOCK_SIZE * BLOCK_SIZE


def test_hits_are_as_long_as_possible_and_change_no_answer():
    expected, hits, compactions = converse(enable_prefix_caching=False)
    assert not any(hits)
    # One in the second turn while it answers, one for every later prompt.
    assert compactions == 5
    answers, hits, compactions = converse(enable_prefix_caching=True)
    assert hits == [turn.num_cached for turn in TURNS]
    assert compactions == 5
    assert answers == expected
