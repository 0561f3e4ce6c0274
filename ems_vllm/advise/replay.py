# SPDX-License-Identifier: Apache-2.0
"""Replays arrivals: who is admitted when, into a pool of so many columns. Ours, and simple.

Prompts are processed one after the other at one rate, tokens are generated at another, whatever
runs beside them. So times are assumptions; what the replay tells is how often the pool, and not the
rest, is what requests wait for. First come, first served; a request that needs a column when there
is none takes those of the youngest, which is computed again, as vLLM preempts.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from ems_vllm.advise.course import Course


@dataclass(frozen=True)
class Speed:
    """Assumptions on a server.

    Attributes:
        token_seconds: From one generated token of a request to the next.
        prompt_rate: Prompt tokens processed per second.
    """

    token_seconds: float
    prompt_rate: float


@dataclass(frozen=True)
class Replay:
    """What became of the arrivals.

    Attributes:
        running_mean: Requests that run at a time, mean over the time in which any does.
        running_most: The same, at most.
        fullest: Largest share of the pool in use.
        blocked_share: Of the time, that in which the next in the queue waits for columns.
        wait_mean: Seconds from arrival to admission.
        wait_p95: The same, not exceeded by 95 %.
        preemptions: How often running requests lost their columns.
    """

    running_mean: float
    running_most: int
    fullest: float
    blocked_share: float
    wait_mean: float
    wait_p95: float
    preemptions: int


@dataclass
class _Job:
    arrival: float
    prompt_len: int
    output_len: int
    course: Course
    held: float = 0.0
    generated: int = 0
    step: int = 0
    wait: float = 0.0
    # Raised when it is admitted or thrown out, so that what was due before no longer counts.
    turn: int = 0
    was_admitted: bool = False


@dataclass
class _State:
    columns: float
    speed: Speed
    most_running: int | None
    waiting: deque[_Job] = field(default_factory=deque)
    running: list[_Job] = field(default_factory=list)
    due: list[tuple[float, int, int, _Job]] = field(default_factory=list)
    prompt: _Job | None = None
    free: float = 0.0
    now: float = 0.0
    number: int = 0
    preemptions: int = 0

    def __post_init__(self) -> None:
        self.free = self.columns

    def push(self, at: float, job: _Job) -> None:
        self.number += 1
        heapq.heappush(self.due, (at, self.number, job.turn, job))

    @property
    def is_blocked(self) -> bool:
        """Whether the next in the queue waits for columns, and for nothing else."""
        if not self.waiting or self.prompt is not None or self._has_no_place:
            return False
        return self._needed(self.waiting[0]) > self.free

    @property
    def _has_no_place(self) -> bool:
        return self.most_running is not None and len(self.running) >= self.most_running

    def _needed(self, job: _Job) -> float:
        return max(job.course.coming_in, job.course.steps[job.step][1] if job.generated else 0.0)

    def admit(self) -> None:
        """Begin with the next prompt, where there is room for it."""
        if not self.waiting or self.prompt is not None or self._has_no_place or self.is_blocked:
            return
        job = self.prompt = self.waiting.popleft()
        job.held = self._needed(job)
        self.free -= job.held
        self.running.append(job)
        if not job.was_admitted:
            job.was_admitted, job.wait = True, self.now - job.arrival
        tokens = job.prompt_len + job.generated
        self.push(self.now + tokens / self.speed.prompt_rate, job)

    def go_on(self, job: _Job) -> None:
        """A prompt is over, or the columns of a request change, or it ends."""
        if self.prompt is job:
            self.prompt = None
        else:
            job.step += 1
        steps = job.course.steps
        if job.step >= len(steps):
            self._give_back(job)
            return
        job.generated, needed = steps[job.step]
        while needed - job.held > self.free + 1e-9:
            youngest = self.running[-1]
            self._preempt(youngest)
            if youngest is job:
                return
        self.free -= needed - job.held
        job.held = needed
        is_last = job.step + 1 == len(steps)
        until = job.output_len if is_last else steps[job.step + 1][0]
        self.push(self.now + (until - job.generated) * self.speed.token_seconds, job)

    def _give_back(self, job: _Job) -> None:
        self.free += job.held
        job.held = 0.0
        job.turn += 1
        self.running.remove(job)

    def _preempt(self, job: _Job) -> None:
        self._give_back(job)
        if self.prompt is job:
            self.prompt = None
        self.preemptions += 1
        self.waiting.appendleft(job)


def replay(
    requests: Iterable[tuple[float, int, int, Course]],
    columns: int,
    speed: Speed,
    max_num_seqs: int | None = None,
) -> Replay | None:
    """Replay requests that each fit the pool.

    Args:
        requests: (arrival in seconds, prompt tokens, generated tokens, course), by arrival.
        columns: Of the pool.
        speed: Of the server.
        max_num_seqs: Requests that may run at a time; None: any number.

    Returns:
        None where there is none.
    """
    jobs = [_Job(*request) for request in requests]
    if not jobs:
        return None
    state = _State(columns, speed, max_num_seqs)
    for job in jobs:
        state.push(job.arrival, job)
    state.now = jobs[0].arrival
    busy = ran = blocked = 0.0
    most, least_free = 0, float(columns)
    while state.due:
        at, _, turn, job = heapq.heappop(state.due)
        if turn != job.turn:
            continue
        elapsed, state.now = at - state.now, at
        if state.running:
            busy += elapsed
            ran += elapsed * len(state.running)
            blocked += elapsed * state.is_blocked
        if not job.was_admitted:
            state.waiting.append(job)
        else:
            state.go_on(job)
        state.admit()
        most, least_free = max(most, len(state.running)), min(least_free, state.free)
    return _result(jobs, state, busy, ran, blocked, most, least_free)


def _result(
    jobs: Sequence[_Job],
    state: _State,
    busy: float,
    ran: float,
    blocked: float,
    most: int,
    least_free: float,
) -> Replay:
    waits = sorted(job.wait for job in jobs)
    return Replay(
        running_mean=ran / busy if busy else 0.0,
        running_most=most,
        fullest=1 - least_free / state.columns if state.columns else 0.0,
        blocked_share=blocked / busy if busy else 0.0,
        wait_mean=sum(waits) / len(waits),
        wait_p95=waits[-(-95 * len(waits) // 100) - 1],
        preemptions=state.preemptions,
    )
