# SPDX-License-Identifier: Apache-2.0
"""From a traffic file to advice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ems_vllm.advise.asked import Asked
from ems_vllm.advise.by_length import by_length
from ems_vllm.advise.candidates import candidates
from ems_vllm.advise.pool import Pool, read_pool
from ems_vllm.advise.quality import load_tokenizer, missing, run_sample
from ems_vllm.advise.quantiles import quantile
from ems_vllm.advise.replay import Speed
from ems_vllm.advise.report import AdviceReport, Budget, PoolSize, Traffic
from ems_vllm.advise.suggestion import Server, suggest
from ems_vllm.advise.thresholds import THRESHOLDS
from ems_vllm.advise.traffic import Request, read_traffic
from ems_vllm.config import ConfigError
from ems_vllm.config.cache_shape import CacheShape
from ems_vllm.config.errors import shown

if TYPE_CHECKING:
    from rich.console import Console


def advise_on(asked: Asked, progress: Console) -> AdviceReport:
    """Reckon, measure and suggest.

    Args:
        asked: What was asked.
        progress: Where to say how long it takes.

    Raises:
        ConfigError: the file, a setting or the model is not what it should be.
    """
    shape = CacheShape.read(_config(asked.model), asked.kv_cache_dtype)
    pool = read_pool(
        shape,
        asked.block_size,
        asked.pool_gib,
        asked.kv_cache_memory_bytes,
        asked.tensor_parallel_size,
        asked.max_num_seqs,
    )
    requests = read_traffic(asked.prompts, lambda: load_tokenizer(asked.model), asked.output_len)
    chosen = candidates(
        asked.recipe, asked.settings, asked.budgets, [one.prompt_len for one in requests]
    )
    plans = [one.config.plan_settings_of(shape.num_layers) for one in chosen]
    speed = Speed(asked.token_ms / 1000, asked.prompt_rate)
    column_bytes = shape.column_bytes(asked.block_size)
    dense, *figures = (
        by_length(settings, requests, asked.block_size, column_bytes, pool, speed)
        for settings in (None, *plans)
    )
    qualities, sample, why = run_sample(asked, requests, chosen, plans, progress)
    budgets = [
        Budget(label=one.label, settings=one.given, by_length=found, quality=of)
        for one, found, of in zip(chosen, figures, qualities, strict=True)
    ]
    budgets.sort(key=lambda budget: -budget.by_length.blocks_held)
    traffic, size = _traffic(requests), _pool_size(pool)
    server = Server(asked.model, asked.recipe, _flags(asked))
    is_replayed = dense.arrivals is not None
    return AdviceReport(
        model=asked.model,
        recipe=asked.recipe,
        prompts=str(asked.prompts),
        block_size=asked.block_size,
        traffic=traffic,
        pool=size,
        token_ms=asked.token_ms if is_replayed else None,
        prompt_rate=asked.prompt_rate if is_replayed else None,
        dense=dense,
        budgets=tuple(budgets),
        sample=sample,
        why_no_quality=why,
        suggestion=suggest(traffic, size, dense, budgets, sample, why, server),
        thresholds={**THRESHOLDS, "max_kl": asked.max_kl},
    )


def _config(model: str) -> Path:
    """The model's folder, or its config.json from the Hub."""
    if Path(model).exists():
        return Path(model)
    try:
        from transformers.utils import cached_file

        found = cached_file(model, "config.json")
    except ModuleNotFoundError as error:
        raise missing(error) from None
    except (OSError, ValueError):
        found = None
    if found is None:
        raise ConfigError(
            f"model={shown(model)} cannot be read: there is no such folder, and no such name in "
            "the Hub's cache or on the Hub; name a folder."
        )
    return Path(found)


def _traffic(requests: Sequence[Request]) -> Traffic:
    prompts = [request.prompt_len for request in requests]
    outputs = [request.output_len for request in requests]
    times = [request.arrival for request in requests if request.arrival is not None]
    return Traffic(
        num_requests=len(requests),
        num_with_text=sum(request.token_ids is not None for request in requests),
        prompt_p50=int(quantile(prompts, 0.5)),
        prompt_p95=int(quantile(prompts, 0.95)),
        prompt_max=max(prompts),
        output_p50=int(quantile(outputs, 0.5)),
        output_p95=int(quantile(outputs, 0.95)),
        output_max=max(outputs),
        outputs=dict(Counter(request.output_from.value for request in requests)),
        seconds=max(times) if times else None,
    )


def _pool_size(pool: Pool | None) -> PoolSize | None:
    if pool is None:
        return None
    return PoolSize(
        columns=pool.columns, gib=pool.num_bytes / 2**30, max_num_seqs=pool.max_num_seqs
    )


def _flags(asked: Asked) -> tuple[str, ...]:
    """Of `vllm serve`, what was reckoned with."""
    given = {
        "--kv-cache-memory-bytes": asked.kv_cache_memory_bytes,
        "--tensor-parallel-size": None
        if asked.tensor_parallel_size == 1
        else (asked.tensor_parallel_size),
        "--max-num-seqs": asked.max_num_seqs,
        "--block-size": None if asked.block_size == 16 else asked.block_size,
        "--kv-cache-dtype": asked.kv_cache_dtype,
    }
    return tuple(
        word for flag, value in given.items() if value is not None for word in (flag, str(value))
    )
