# SPDX-License-Identifier: Apache-2.0
"""Which prompts are run, how long that will take, and what came of it."""

from __future__ import annotations

import random
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

from ems_vllm.advise.course import course
from ems_vllm.advise.report import Quality
from ems_vllm.advise.traffic import Request
from ems_vllm.confidence import upper_bound
from ems_vllm.plan import PlanSettings

if TYPE_CHECKING:
    from ems_vllm.advise.proxy import Distance, Proxy

CONFIDENCE = 0.95
# Tokens of a prompt by which the time is reckoned.
_TRIAL = 512
_TRIAL_ANSWER = 8
_NUM_TRIALS = 2


@dataclass(frozen=True)
class Drawn:
    """A sample of the traffic.

    Attributes:
        prompts: Token ids of each, in the order of the file.
        eligible: Lengths of all from which they were drawn.
        num_too_long: That were left out for their length.
    """

    prompts: list[tuple[int, ...]]
    eligible: list[int]
    num_too_long: int


def draw(
    requests: Sequence[Request],
    settings: Sequence[PlanSettings],
    block_size: int,
    num: int,
    num_tokens: int,
    max_prompt_len: int,
    seed: int,
) -> Drawn:
    """Prompts that any of the budgets compresses, each as likely as any other.

    Args:
        requests: The traffic.
        settings: Of each budget.
        block_size: Tokens per block.
        num: Prompts to draw, at most.
        num_tokens: Of an answer that will be compared.
        max_prompt_len: Longer ones are left out.
        seed: The same draws the same.
    """
    changed: dict[int, bool] = {}

    def is_compressed(length: int) -> bool:
        if length not in changed:
            changed[length] = any(
                course(one, length, num_tokens, block_size).compressed for one in settings
            )
        return changed[length]

    texts = [
        request.token_ids
        for request in requests
        if request.token_ids is not None and is_compressed(request.prompt_len)
    ]
    eligible = [text for text in texts if len(text) <= max_prompt_len]
    chosen = random.Random(seed).sample(range(len(eligible)), min(num, len(eligible)))
    return Drawn(
        prompts=[eligible[index] for index in sorted(chosen)],
        eligible=[len(text) for text in eligible],
        num_too_long=len(texts) - len(eligible),
    )


def reckoned_seconds(proxy: Proxy, prompts: Sequence[tuple[int, ...]], num_tokens: int) -> float:
    """How long `measured` will take, by trials on the beginning of a prompt.

    Args:
        proxy: What will run.
        prompts: At least one.
        num_tokens: Of an answer that are compared.
    """
    part = max(prompts, key=len)[:_TRIAL]
    # The first pays for what is loaded and allocated once.
    _, *trials = [_trial(proxy, part, num_tokens) for _ in range(1 + _NUM_TRIALS)]
    per_token, per_step, of_budgets = (fmean(found) for found in zip(*trials, strict=True))
    tokens = sum(map(len, prompts))
    return per_token * tokens + len(prompts) * (num_tokens * per_step + of_budgets)


def _trial(proxy: Proxy, part: Sequence[int], num_tokens: int) -> tuple[float, float, float]:
    """Seconds of a prompt's token, of a token of the answer, and of all budgets along an answer."""
    began = time.perf_counter()
    prompt = proxy.prefill(part)
    after_prompt = time.perf_counter()
    answer = proxy.answer(prompt, _TRIAL_ANSWER)
    after_answer = time.perf_counter()
    # As many as there will be, whatever the model says.
    proxy.distances(prompt, (answer * num_tokens)[:num_tokens])
    return (
        (after_prompt - began) / len(part),
        (after_answer - after_prompt) / len(answer),
        time.perf_counter() - after_answer,
    )


def measured(
    proxy: Proxy, prompts: Iterable[tuple[int, ...]], max_kl: float, num_budgets: int
) -> list[Quality]:
    """What the sample says of each budget.

    Args:
        proxy: Has the budgets.
        prompts: Token ids of each, at least one.
        max_kl: Threshold, nats per token.
        num_budgets: That the proxy has.
    """
    found: list[list[Distance]] = []
    for token_ids in prompts:
        prompt = proxy.prefill(token_ids)
        found.append(proxy.distances(prompt, proxy.answer(prompt)))
    return [_quality([of[index] for of in found], max_kl) for index in range(num_budgets)]


def _quality(found: Sequence[Distance], max_kl: float) -> Quality:
    kls = [one.kl for one in found]
    above = sum(kl > max_kl for kl in kls)
    return Quality(
        kl_mean=sum(kls) / len(kls),
        kl_worst=max(kls),
        kl=tuple(kls),
        same_top=sum(one.same_top for one in found) / len(found),
        num_above=above,
        above_at_most=upper_bound(above, len(kls), CONFIDENCE),
    )
