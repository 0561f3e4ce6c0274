# SPDX-License-Identifier: Apache-2.0
"""Tasks of lm-evaluation-harness (GSM8K, AIME and the like), through its own OpenAI client."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

from ems_vllm.config.errors import ConfigError, shown
from ems_vllm.eval.records.budget import largest_kv_budget
from ems_vllm.eval.records.journal import Journal
from ems_vllm.eval.records.method import Method
from ems_vllm.eval.records.preset import LM_EVAL, Preset
from ems_vllm.eval.records.results import SampleResult
from ems_vllm.eval.server.endpoint import Endpoint


@dataclass(frozen=True)
class Job:
    """One task of the harness for one method and seed; `name` has our prefix."""

    method: Method
    name: str
    length: int
    seed: int


def jobs(preset: Preset, method: Method, journal: Journal) -> list[Job]:
    """What has not been answered yet."""
    return [
        Job(method, name, preset.lengths_of(name)[0], seed)
        for name in _names(preset)
        for seed in preset.seeds
        if not any((key.task, key.seed) == (name, seed) for key in journal.entries)
    ]


def answered(preset: Preset, journal: Journal) -> list[SampleResult]:
    """All answers of the preset's tasks."""
    names = _names(preset)
    entries = journal.entries.items()
    return [e.result for k, e in entries if k.task in names and k.seed in preset.seeds]


async def evaluate(
    endpoint: Endpoint, job: Job, preset: Preset, tokenizer: str, is_compressing: bool
) -> list[SampleResult]:
    """Run a task.

    Prompts, few-shot examples and metrics are the harness's; `samples` is its `limit`, `seed` its
    seed. A budget that is a fraction is one of the task's (first) length, which should be about
    what its prompts and answers take.

    Raises:
        ConfigError: the harness is not installed, or does not know the task.
    """
    xargs = _arguments(job.method, job.length, preset, is_compressing)
    return await asyncio.to_thread(
        _evaluate, endpoint, job.name, job.length, job.seed, preset, tokenizer, xargs
    )


def _names(preset: Preset) -> list[str]:
    return [task for task in preset.tasks if task.startswith(LM_EVAL)]


def _arguments(method: Method, length: int, preset: Preset, is_compressing: bool) -> dict[str, Any]:
    if method.is_full:
        return {"kv_compression": "off"} if is_compressing else {}
    total = method.budget.total(length)
    assert total is not None
    server = preset.server
    # Prompts differ in length: the longest that the recent window may become.
    total -= server.block_size - 1
    return {"kv_budget": largest_kv_budget(total, server.recent_window, server.block_size)}


def _evaluate(
    endpoint: Endpoint,
    name: str,
    length: int,
    seed: int,
    preset: Preset,
    tokenizer: str,
    xargs: dict[str, Any],
) -> list[SampleResult]:
    # Imported here: an optional dependency, and a heavy one.
    try:
        import lm_eval
    except ModuleNotFoundError:
        raise ConfigError(
            f"tasks={shown(name)} needs lm-evaluation-harness, which is not installed: "
            "pip install 'lm_eval[api]', or leave the task out."
        ) from None
    task = name.removeprefix(LM_EVAL)
    is_chat = preset.prompt_format == "chat"
    path = "chat/completions" if is_chat else "completions"
    try:
        output = lm_eval.simple_evaluate(
            model="local-chat-completions" if is_chat else "local-completions",
            model_args={
                "model": endpoint.model,
                "base_url": f"{endpoint.url}/v1/{path}",
                "tokenizer": tokenizer,
                "num_concurrent": preset.concurrency,
                "max_length": length,
            },
            tasks=[task],
            limit=preset.samples_of(name),
            gen_kwargs={"temperature": 0, **({"vllm_xargs": xargs} if xargs else {})},
            apply_chat_template=is_chat,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
            log_samples=True,
        )
    # The harness raises whatever its tasks raise; its own words say what is wrong.
    except Exception as error:
        raise ConfigError(
            f"tasks={shown(name)} failed in lm-evaluation-harness ({type(error).__name__}: "
            f"{error}): see its documentation of this task."
        ) from error
    return [
        SampleResult(
            task=name,
            length=length,
            seed=seed,
            index=int(logged["doc_id"]),
            score=float(logged[logged["metrics"][0]]),
            output=str(logged["filtered_resps"][0]),
        )
        for logged in _one_filter(output["samples"][task])
    ]


def _one_filter(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every answer once: where several filters extract it, by the most lenient of them."""
    filters = sorted({str(sample.get("filter")) for sample in samples})
    chosen = "flexible-extract" if "flexible-extract" in filters else filters[0]
    return [sample for sample in samples if str(sample.get("filter")) == chosen]
