# SPDX-License-Identifier: Apache-2.0
"""What is said to be saved is what a pool without compression would hold besides."""

from __future__ import annotations

from hypothesis import settings, strategies
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from ems_vllm.engine.scheduler.dense_pool import DensePool

REQUESTS = strategies.sampled_from("abc")
# The conversations that requests go on with; the first two begin alike.
CONVERSATIONS = ("xxyyyyyyyy", "xxzzzzzzzz", "wwwwwwwwww")


class Comparison(RuleBasedStateMachine):
    """Random requests, against the columns that they have lost, written down."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = DensePool()
        self.conversations: dict[str, str] = {}
        # By request and group, columns lost so far.
        self.lost: dict[tuple[str, int], int] = {}

    @rule(
        req_id=REQUESTS,
        conversation=strategies.sampled_from(CONVERSATIONS),
        group_id=strategies.integers(0, 1),
        num_columns=strategies.integers(1, 4),
    )
    def lose(self, req_id: str, conversation: str, group_id: int, num_columns: int) -> None:
        conversation = self.conversations.setdefault(req_id, conversation)
        first = self.lost.get((req_id, group_id), 0)
        end = min(first + num_columns, len(conversation))
        # Only a conversation as a whole is hashed, or is not.
        contents = []
        if conversation[0] == "x":
            contents = [conversation[: column + 1] for column in range(first, end)]
        before = self.pool.num_blocks
        assert self.pool.lost(req_id, group_id, contents, end - first) >= 0
        assert self.pool.num_blocks >= before
        self.lost[req_id, group_id] = end

    @rule(req_id=REQUESTS)
    def end(self, req_id: str) -> None:
        self.pool.released(req_id)
        self.conversations.pop(req_id, None)
        self.lost = {key: count for key, count in self.lost.items() if key[0] != req_id}

    @invariant()
    def counts_what_is_alike_once(self) -> None:
        blocks = set()
        for (req_id, group_id), count in self.lost.items():
            conversation = self.conversations[req_id]
            owner = "" if conversation[0] == "x" else req_id
            blocks.update((owner, group_id, conversation[: at + 1]) for at in range(count))
        assert self.pool.num_blocks == len(blocks)


Comparison.TestCase.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
TestAgainstColumnsWrittenDown = Comparison.TestCase


def pool_without(*lost: tuple[str, int]) -> DensePool:
    pool = DensePool()
    for req_id, num_columns in lost:
        pool.lost(req_id, 0, (), num_columns)
    return pool


def test_nobody_is_crowded_out_where_all_would_fit():
    pool = pool_without(("old", 6), ("new", 4))
    assert pool.crowded_out(10, [("new", 9), ("old", 9)]) == 0


def test_the_last_admitted_go_until_the_others_fit_and_count_once():
    pool = pool_without(("old", 6), ("middle", 4), ("new", 4))
    running = [("new", 5), ("middle", 7), ("old", 9)]
    # 14 blocks more, of which 8 are free: 6 are missing.
    assert pool.crowded_out(8, running) == 2
    assert pool.crowded_out(8, running) == 0
    assert pool.crowded_out(1, running) == 1


def test_a_request_counts_again_when_it_is_admitted_again():
    pool = pool_without(("old", 6), ("new", 4))
    running = [("new", 5), ("old", 9)]
    assert pool.crowded_out(9, running) == 1
    pool.released("new")
    pool.lost("new", 0, (), 4)
    assert pool.crowded_out(9, running) == 1
