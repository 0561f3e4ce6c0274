# SPDX-License-Identifier: Apache-2.0
"""Requests that arrive while others run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from engine.harness import EngineProbe


@dataclass(frozen=True)
class Arrival:
    """A greedy request that arrives before the given step of the engine."""

    step: int
    prompt: list[int]
    max_tokens: int
    extra_args: dict[str, Any] | None = None


def serve(
    probe: EngineProbe,
    arrivals: Sequence[Arrival],
    before_step: Callable[[int], None] = lambda step: None,
) -> list[Any]:
    """vLLM's outputs of requests, in the order given.

    Args:
        arrivals: Any order; steps in which nothing runs are skipped over.
        before_step: Called with the number of the step that comes next.
    """
    from vllm import SamplingParams

    llm_engine = probe.llm.llm_engine
    waiting = sorted(enumerate(arrivals), key=lambda item: item[1].step)
    outputs: dict[str, Any] = {}
    step = 0
    while waiting or llm_engine.has_unfinished_requests():
        while waiting and (waiting[0][1].step <= step or not llm_engine.has_unfinished_requests()):
            index, arrival = waiting.pop(0)
            params = SamplingParams(
                max_tokens=arrival.max_tokens,
                temperature=0,
                ignore_eos=True,
                extra_args=arrival.extra_args,
            )
            llm_engine.add_request(str(index), {"prompt_token_ids": arrival.prompt}, params)
        before_step(step)
        for output in llm_engine.step():
            if output.finished:
                outputs[output.request_id] = output
        step += 1
    return [outputs[str(index)] for index in range(len(arrivals))]
