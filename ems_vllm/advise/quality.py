# SPDX-License-Identifier: Apache-2.0
"""Runs a sample of the traffic, where there is anything to run."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.progress import track

from ems_vllm.advise.asked import Asked
from ems_vllm.advise.candidates import Candidate
from ems_vllm.advise.report import Quality, Sample
from ems_vllm.advise.sampling import CONFIDENCE, Drawn, draw, measured, reckoned_seconds
from ems_vllm.advise.thresholds import TOLERATED
from ems_vllm.advise.traffic import Request
from ems_vllm.confidence import needed
from ems_vllm.config import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from ems_vllm.eval.questions.tokenizer import HubTokenizer
    from ems_vllm.plan import PlanSettings


def load_tokenizer(model: str) -> HubTokenizer:
    """Of a model, as the evaluation loads it."""
    try:
        from ems_vllm.eval.questions.tokenizer import HubTokenizer

        return HubTokenizer(model)
    except ModuleNotFoundError as error:
        raise missing(error) from None


def missing(error: ModuleNotFoundError) -> ConfigError:
    """That a package is not installed."""
    return ConfigError(
        f"`ems-vllm advise` needs the package {error.name}: pip install 'ems-vllm[eval]'."
    )


def run_sample(
    asked: Asked,
    requests: Sequence[Request],
    chosen: Sequence[Candidate],
    plans: Sequence[PlanSettings],
    progress: Console,
) -> tuple[Sequence[Quality | None], Sample | None, str | None]:
    """What the sample says of each budget, or why there is none."""
    none = [None] * len(chosen)
    if not asked.quality:
        return none, None, "it was switched off"
    if all(request.token_ids is None for request in requests):
        return none, None, "the file has lengths alone"
    drawn = draw(
        requests,
        plans,
        asked.block_size,
        asked.sample,
        asked.tokens,
        asked.max_prompt_len,
        asked.seed,
    )
    if not drawn.prompts:
        too_long = f"; {drawn.num_too_long:,} are longer" if drawn.num_too_long else ""
        return (
            none,
            None,
            f"no prompt of up to {asked.max_prompt_len:,} tokens would be compressed{too_long}",
        )
    return _run(asked, chosen, drawn, progress)


def _run(
    asked: Asked, chosen: Sequence[Candidate], drawn: Drawn, progress: Console
) -> tuple[Sequence[Quality], Sample, None]:
    try:
        # Imported here: arithmetic needs neither.
        from ems_vllm.advise.proxy import Proxy
        from ems_vllm.eval.transformers_engine.engine import TransformersEngine
    except ModuleNotFoundError as error:
        raise missing(error) from None
    try:
        engine = TransformersEngine.load(asked.model, asked.device, asked.dtype, asked.block_size)
    except ConfigError as error:
        raise ConfigError(f"{error} Or leave the sample out: --no-quality.") from None
    ends = load_tokenizer(asked.model).end_token_ids()
    proxy = Proxy(engine, [one.config for one in chosen], asked.tokens, ends)
    seconds = reckoned_seconds(proxy, drawn.prompts, asked.tokens)
    progress.print(
        f"Running {len(drawn.prompts)} prompts of {sum(map(len, drawn.prompts)):,} tokens in all, "
        f"dense and with {len(chosen)} budgets: about {_time(seconds)}, by a trial "
        "(--no-quality leaves it out).",
        highlight=False,
        markup=False,
    )
    began = time.perf_counter()
    qualities = measured(
        proxy, track(drawn.prompts, "prompts", console=progress), asked.max_kl, len(chosen)
    )
    sample = Sample(
        num_prompts=len(drawn.prompts),
        num_eligible=len(drawn.eligible),
        num_too_long=drawn.num_too_long,
        prompt_shortest=min(drawn.eligible),
        prompt_longest=max(drawn.eligible),
        num_tokens=asked.tokens,
        max_kl=asked.max_kl,
        confidence=CONFIDENCE,
        prompts_needed=needed(TOLERATED, CONFIDENCE),
        seconds=time.perf_counter() - began,
    )
    return qualities, sample, None


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} minutes"
