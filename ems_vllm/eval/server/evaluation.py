# SPDX-License-Identifier: Apache-2.0
"""An evaluation: samples, servers, methods, one after the other."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console

from ems_vllm.config import ConfigError, load_config
from ems_vllm.config.cache_shape import CacheShape
from ems_vllm.config.errors import shown
from ems_vllm.eval.questions.sample import Sample
from ems_vllm.eval.questions.tasks import TASKS
from ems_vllm.eval.questions.tokenizer import Tokenizer
from ems_vllm.eval.records import environment
from ems_vllm.eval.records.budget import Budget
from ems_vllm.eval.records.journal import Entry, Journal
from ems_vllm.eval.records.method import FULL, VLLM, Method
from ems_vllm.eval.records.preset import LM_EVAL, Preset
from ems_vllm.eval.records.results import EvalResult, MethodResult
from ems_vllm.eval.records.run_folder import RunFolder
from ems_vllm.eval.server import lm_eval_client
from ems_vllm.eval.server.ask_all import ask_all
from ems_vllm.eval.server.asker import Asker, cannot_prescribe
from ems_vllm.eval.server.endpoint import Endpoint
from ems_vllm.eval.server.measure import serving
from ems_vllm.eval.server.target import Target, running, started

_PROCESSOR = "ems_vllm.engine.measuring.forced_tokens:ForcedTokens"


@dataclass(frozen=True)
class Work:
    """What one method has to do.

    Attributes:
        journal: What was answered so far.
        covered: Samples that its budget has room for.
        left_out: Lengths of the others.
        todo: Samples without an answer.
        lm_eval: Tasks of lm-evaluation-harness without answers.
    """

    method: Method
    journal: Journal
    covered: list[Sample]
    left_out: list[int]
    todo: list[Sample]
    lm_eval: list[lm_eval_client.Job]


@dataclass(frozen=True)
class Evaluation:
    """Questions to servers, method by method.

    Attributes:
        model: As for `vllm serve`, or the name of the model at `base_url`.
        tokenizer: Of the model.
        tokenizer_name: Its folder or name.
        preset: What is asked, of which methods.
        folder: For answers, logs and results.
        base_url: A running server; None starts one for each recipe.
        api_key: For a server that wants one.
        console: For progress and remarks.
    """

    model: str
    tokenizer: Tokenizer
    tokenizer_name: str
    preset: Preset
    folder: RunFolder
    base_url: str | None
    api_key: str
    console: Console

    def __call__(self) -> EvalResult:
        """Ask what has not been answered yet; the result is written after every method."""
        samples = list(self.samples())
        for name in self.preset.tasks:
            if not self.preset.protocols_of(name):
                self.console.print(
                    f"{name} cannot be written in protocols={','.join(self.preset.protocols)}; "
                    "left out.",
                    highlight=False,
                )
        self.folder.claim(self.model, self.tokenizer_name, self.preset)
        result = EvalResult(
            model=self.model,
            preset=self.preset.name,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            environment=environment.describe(),
            higher_is_better={
                task: task.startswith(LM_EVAL) or TASKS.get(task).higher_is_better
                for task in self.preset.tasks
            },
        )
        for recipe, methods in self._recipes():
            works = [self._work(method, samples) for method in methods]
            # Where everything has been answered, no server is needed.
            is_pending = any(work.todo or work.lm_eval for work in works)
            with self._server(recipe, samples) if is_pending else nullcontext(None) as server:
                for work in works:
                    if server is not None:
                        asyncio.run(self._measure(server, work))
                    result.methods.append(self._summed_up(work))
                    result.write(self.folder.result)
        return result

    def samples(self) -> Iterator[Sample]:
        """All samples of the preset, task by task."""
        for name in self.preset.tasks:
            if name.startswith(LM_EVAL):
                continue
            task = TASKS.get(name)(self.preset.task_options)
            count = self.preset.samples_of(name)
            for protocol in self.preset.protocols_of(name):
                for length in self.preset.lengths_of(name):
                    for seed in self.preset.seeds:
                        yield from task.samples(length, seed, count, self.tokenizer, protocol)

    def _recipes(self) -> Iterator[tuple[str, list[Method]]]:
        recipes = self.preset.recipes
        if self.base_url is not None and len(recipes) > 1:
            raise ConfigError(
                f"recipes={','.join(recipes)} is not possible with base_url="
                f"{shown(self.base_url)}: a server has one recipe; name that one."
            )
        yield FULL, [Method(FULL, VLLM)]
        for recipe in recipes:
            yield recipe, [Method(recipe, VLLM, Budget.parse(b)) for b in self.preset.budgets]

    def _server(self, recipe: str, samples: list[Sample]) -> AbstractContextManager[Target]:
        """A server for this recipe."""
        if self.base_url is not None:
            return running(self.base_url)
        args = [*self._common_args(samples), *self.preset.server.args]
        if recipe != FULL:
            overrides = self.preset.server.recipe_overrides(self._largest_total())
            args += ["--kv-compression", recipe]
            args += ["--kv-compression-config", json.dumps(overrides)]
        log = self.folder.server_log(recipe)
        return started(self.model, args, log, f"Starting a server: {recipe}", self.console)

    def _common_args(self, samples: list[Sample]) -> list[str]:
        longest = max(
            length for task in self.preset.tasks for length in self.preset.lengths_of(task)
        )
        args = ["--block-size", str(self.preset.server.block_size)]
        args += ["--max-model-len", str(longest), "--served-model-name", self.model]
        if any(_is_prescribed(sample) for sample in samples):
            args += ["--logits-processors", _PROCESSOR]
        return args

    def _largest_total(self) -> int:
        lengths = {n for task in self.preset.tasks for n in self.preset.lengths_of(task)}
        budgets = [Budget.parse(b) for b in self.preset.budgets]
        return max(budget.total(length) or 1 for budget in budgets for length in lengths)

    def _work(self, method: Method, samples: list[Sample]) -> Work:
        journal = self.folder.journal(method)
        covered = [s for s in samples if method.covers(s, self.preset.server)]
        return Work(
            method=method,
            journal=journal,
            covered=covered,
            left_out=sorted({s.length for s in samples} - {s.length for s in covered}),
            todo=[s for s in covered if not journal.is_answered(s.key)],
            lm_eval=lm_eval_client.jobs(self.preset, method, journal),
        )

    async def _measure(self, target: Target, work: Work) -> None:
        """Ask what has no answer."""
        async with Endpoint(
            target.url, self.model, self.preset.concurrency, self.api_key, target.is_alive
        ) as endpoint:
            asker = await self._asker(endpoint, work.method, work.todo)
            if work.todo:
                await ask_all(asker, work.journal, work.todo, self.preset.concurrency, self.console)
            for job in work.lm_eval:
                answers = await lm_eval_client.evaluate(
                    endpoint, job, self.preset, self.tokenizer_name, asker.is_compressing
                )
                for answer in answers:
                    work.journal.add(Entry(result=answer))

    def _summed_up(self, work: Work) -> MethodResult:
        method, preset, journal = work.method, self.preset, work.journal
        config = None
        if not method.is_full:
            overrides = preset.server.recipe_overrides(self._largest_total())
            config = load_config({"recipe": method.name, **overrides})
        if work.left_out:
            self.console.print(
                f"{method}: no room for a block at {', '.join(f'{n:,}' for n in work.left_out)} "
                "tokens; left out.",
                highlight=False,
            )
        return MethodResult(
            method=method.name if method.is_full else Path(method.name).stem,
            budget=method.budget.count,
            budget_fraction=method.budget.fraction,
            settings={
                "server": preset.server.model_dump(mode="json"),
                **({"recipe": config.to_dict()} if config else {}),
                **({"lengths_left_out": work.left_out} if work.left_out else {}),
            },
            samples=[
                *(journal.entries[sample.key].result for sample in work.covered),
                *lm_eval_client.answered(preset, journal),
            ],
            serving=serving(
                journal,
                {s.key for s in work.covered if not s.compresses_writing},
                config,
                self._shape(),
                preset.server.block_size,
            ),
        )

    async def _asker(self, endpoint: Endpoint, method: Method, todo: list[Sample]) -> Asker:
        is_compressing = self.base_url is None and not method.is_full
        if self.base_url is not None and self.preset.recipes:
            is_compressing = await endpoint.compresses()
            if not is_compressing:
                raise ConfigError(
                    f"base_url={shown(self.base_url)} does not compress: start it with "
                    "--kv-compression, or give --recipes full."
                )
        prescribed = [sample for sample in todo if _is_prescribed(sample)]
        can_prescribe = bool(prescribed) and await endpoint.can_prescribe()
        needed = [s for s in prescribed if s.written_token_ids or not method.is_full]
        if needed and not can_prescribe:
            raise cannot_prescribe(needed[0].task)
        full_answers = {}
        if not method.is_full and any(sample.follows_full for sample in todo):
            # The full cache comes first.
            entries = self.folder.journal(Method(FULL, VLLM)).entries
            full_answers = {k: e.full_answer for k, e in entries.items() if e.full_answer}
        return Asker(
            endpoint,
            self.tokenizer,
            method,
            self.preset.server,
            is_compressing,
            can_prescribe,
            full_answers,
        )

    def _shape(self) -> CacheShape | None:
        try:
            return CacheShape.read(Path(self.model))
        except ConfigError:
            return None


def _is_prescribed(sample: Sample) -> bool:
    """Whether it takes our logits processor."""
    written = sample.continuation_token_ids or sample.written_token_ids
    return bool(written) or sample.follows_full
