# SPDX-License-Identifier: Apache-2.0
"""What a run under load came to, and everything in it that must not be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from e2e.load_clients import Answer, Case, Job
from rich.table import Table

from ems_vllm.eval.server.block_pool import PoolState

# Where the best two tokens are this close, the order of a sum decides between them, and that
# depends on what else is in a batch, in vLLM as here. In log-probability.
NEAR_TIE = 1e-3
# Of processes that hold 1,100 MiB, once they are warm; plain vLLM's move by as much as 8 MiB.
MAX_GROWTH_MIB = 8.0


@dataclass(frozen=True)
class MemorySample:
    """Resident memory of a server when so many requests had ended, in MiB."""

    num_ended: int
    api_server: float
    engine: float


@dataclass(frozen=True)
class Difference:
    """An answer that is not the one the same request gets alone.

    Attributes:
        token_idx: The first token that differs.
        top_gap: Log-probability of that token minus the second best, alone.
    """

    case_idx: int
    prompt_len: int
    token_idx: int
    top_gap: float
    num_cached: int

    @property
    def is_near_tie(self) -> bool:
        return self.top_gap < NEAR_TIE


@dataclass(frozen=True)
class Expectation:
    """What a run must have gone through to prove anything, and what it must have answered.

    Attributes:
        preemptions, hits: Whether there must be any.
        exact_cases: Cases whose answers must be those they get alone; None: all.
    """

    preemptions: bool = True
    hits: bool = True
    exact_cases: frozenset[int] | None = None


@dataclass(frozen=True)
class Result:
    """One configuration under load.

    Attributes:
        errors: What clients got instead of an answer.
        num_cases_compared: Different requests of which at least one answer was finished.
        num_prefix_hits: Tokens that prompts took from the prefix cache.
        differences: Of answers that must be equal.
        num_free_differences: Answers that differ where a hit may change them.
        num_changed_afterwards: Requests that got another answer alone once the load was over.
        end: The pool after the load.
        memory: During the load.
        num_unlike_dense: Requests that compression answers differently, alone; None: not known.
    """

    name: str
    expectation: Expectation
    num_finished: int
    num_left_waiting: int
    num_left_streaming: int
    num_cases: int
    num_cases_compared: int
    num_preemptions: int
    num_prefix_hits: int
    errors: list[str]
    differences: list[Difference]
    num_free_differences: int
    num_changed_afterwards: int
    end: PoolState
    wall_s: float
    memory: list[MemorySample] = field(default_factory=list)
    num_unlike_dense: int | None = None

    @property
    def num_near_ties(self) -> int:
        return sum(difference.is_near_tie for difference in self.differences)

    def violations(self) -> list[str]:
        """Sentences; none when nothing was lost."""
        found = [f"a client got an error: {error}" for error in self.errors]
        found += [
            f"request {d.case_idx} ({d.prompt_len} tokens, {d.num_cached} of them cached) answers "
            f"differently from token {d.token_idx} on, where the best two are {d.top_gap:.2g} apart"
            for d in self.differences
            if not d.is_near_tie
        ]
        if self.num_cases_compared < self.num_cases:
            found.append(f"{self.num_cases - self.num_cases_compared} requests never finished")
        if self.expectation.preemptions and not self.num_preemptions:
            found.append("nothing was preempted: the pool is too large to prove anything")
        if self.expectation.hits and not self.num_prefix_hits:
            found.append("no prefix was hit")
        if self.num_unlike_dense == 0:
            found.append("compression changes no answer: equal ones prove nothing")
        if self.end.num_running or self.end.num_waiting or self.end.num_used_blocks:
            found.append(f"something is left in the engine: {self.end}")
        if self.num_changed_afterwards:
            found.append(f"{self.num_changed_afterwards} answers changed for good")
        growth = steady_growth_mib(self.memory) if self.memory else 0.0
        if growth > MAX_GROWTH_MIB:
            found.append(f"memory grew by {growth:.1f} MiB steadily (at most {MAX_GROWTH_MIB:.0f})")
        return [f"{self.name}: {sentence}." for sentence in found]

    def to_dict(self) -> dict[str, Any]:
        return {
            "configuration": self.name,
            **{name: get(self) for name, get in _FIGURES.items()},
            "largest_gap_at_a_difference": max((d.top_gap for d in self.differences), default=None),
            "memory": {
                "num_ended": [sample.num_ended for sample in self.memory],
                "api_server_mib": [round(sample.api_server, 1) for sample in self.memory],
                "engine_mib": [round(sample.engine, 1) for sample in self.memory],
            },
            "violations": self.violations(),
        }


def steady_growth_mib(samples: Sequence[MemorySample]) -> float:
    """Memory gained over the last four fifths of a load, if it had grown evenly.

    Now and then an allocator takes or returns 20 MiB at once, in plain vLLM too. What is lost with
    every request grows all the time, so the smallest step between fifths counts.
    """
    fifth = max(1, len(samples) // 5)
    means = [_mean(samples[i * fifth : (i + 1) * fifth]) for i in range(1, 5)]
    return 3 * min(after - before for before, after in pairwise(means))


def compare(
    cases: Sequence[Case], alone: Sequence[Answer], results: Sequence[tuple[Job, Answer]]
) -> list[Difference]:
    """Every answer, also of a client that left, that does not go as it goes alone."""
    differences = []
    for job, answer in results:
        expected = alone[job.case_idx]
        pairs = zip(answer.token_ids, expected.token_ids, strict=False)
        first = next((i for i, (got, right) in enumerate(pairs) if got != right), None)
        if first is not None:
            length = len(cases[job.case_idx].prompt)
            gap = expected.top_gaps[first]
            differences.append(Difference(job.case_idx, length, first, gap, answer.num_cached))
    return differences


def table(results: Sequence[Result]) -> Table:
    """A row per figure, a column per configuration."""
    made = Table(title="every answer under load, compared with the same request alone")
    made.add_column("")
    for result in results:
        made.add_column(result.name, justify="right")
    for name, get in _FIGURES.items():
        values = (get(result) for result in results)
        cells = ("" if value is None else f"{value:,}" for value in values)
        made.add_row(name.replace("_", " "), *cells)
    return made


def _mean(samples: Sequence[MemorySample]) -> float:
    return sum(sample.api_server + sample.engine for sample in samples) / max(1, len(samples))


def _memory_at(result: Result, part: float) -> int | None:
    """All processes together when this part of the load was done, in MiB."""
    if not result.memory:
        return None
    return round(_mean([result.memory[round(part * (len(result.memory) - 1))]]))


_FIGURES: dict[str, Any] = {
    "answers_finished": lambda r: r.num_finished,
    "left_while_waiting": lambda r: r.num_left_waiting,
    "left_while_streaming": lambda r: r.num_left_streaming,
    "different_requests_compared": lambda r: r.num_cases_compared,
    "of_these_unlike_dense": lambda r: r.num_unlike_dense,
    "answers_that_differ": lambda r: len(r.differences),
    "of_these_near_ties": lambda r: r.num_near_ties,
    "differ_where_a_hit_may": lambda r: r.num_free_differences,
    "client_errors": lambda r: len(r.errors),
    "preemptions": lambda r: r.num_preemptions,
    "prefix_tokens_hit": lambda r: r.num_prefix_hits,
    "changed_afterwards": lambda r: r.num_changed_afterwards,
    "blocks_left_in_use": lambda r: r.end.num_used_blocks,
    "requests_left": lambda r: r.end.num_running + r.end.num_waiting,
    "memory_MiB_after_warm_up": lambda r: _memory_at(r, 0.2),
    "memory_MiB_at_the_end": lambda r: _memory_at(r, 1.0),
    "steady_memory_growth_MiB": lambda r: (
        round(steady_growth_mib(r.memory), 1) if r.memory else None
    ),
    "seconds_under_load": lambda r: round(r.wall_s, 1),
}
