# SPDX-License-Identifier: Apache-2.0
"""Answers of several recipes to one prompt."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, TypeVar, cast

from ems_vllm.config import RequestOptions
from ems_vllm.eval.records.method import Method
from ems_vllm.eval.transformers_engine.answer import answering, following, predicted, recording
from ems_vllm.eval.transformers_engine.engine import TransformersEngine, load_vocabulary
from ems_vllm.eval.transformers_engine.server_config import request_options, server_config
from ems_vllm.ops import reference_operators

if TYPE_CHECKING:
    import torch

    from ems_vllm.eval.records.prompt_files import AnswerLine, PromptLine
    from ems_vllm.eval.records.results import MethodResult
    from ems_vllm.eval.transformers_engine.request import CompressedRequest


_T = TypeVar("_T")


class Runner:
    """Answers prompts with transformers.

    Args:
        engine: The model.
        name: Its folder, for the tokenizer.
        methods: What will be asked of it.
        prompts: What will be asked.
        overrides: Settings of KVCompressionConfig, for every recipe.
        compiled: Whether policies use the compiled operators.

    Raises:
        ConfigError: a recipe or a setting is wrong.
    """

    def __init__(
        self,
        engine: TransformersEngine,
        name: str,
        methods: Sequence[Method],
        prompts: Sequence[PromptLine],
        overrides: dict[str, Any],
        compiled: bool = False,
    ) -> None:
        self._engine = engine
        self._compiled = compiled
        self._vocabulary = load_vocabulary(name, engine.model)
        lengths = {prompt.length for prompt in prompts}
        totals = [method.budget.total(length) or 1 for method in methods for length in lengths]
        self._configs = {
            recipe: server_config(recipe, max(totals, default=1), overrides, engine.block_size)
            for recipe in {method.name for method in methods}
        }

    def describe(self, method: Method) -> MethodResult:
        """A method as a result without samples."""
        described = method.describe()
        if described.is_full:
            return described
        settings = self._configs[method.name].to_dict()
        return described.model_copy(update={"settings": settings})

    def answers(
        self, prompt: PromptLine, methods: Sequence[Method]
    ) -> Iterator[tuple[Method, AnswerLine]]:
        """Answers to a prompt, which is processed once; none where a budget has no room."""
        window = max(config.obs_window for config in self._configs.values())
        asked = []
        for method in methods:
            config = self._configs[method.name]
            options = request_options(method, prompt, config, self._engine.block_size)
            if options is not None:
                asked.append((method, config, options))
        num_tokens = len(prompt.prompt_token_ids)
        needed = [
            self._engine.scored_queries(num_tokens, config, options) for _, config, options in asked
        ]
        scored = {queries for queries in needed if queries is not None}
        prefilled = self._engine.prefill(prompt.prompt_token_ids, window, scored)
        logits, full = prefilled.logits, None
        if prompt.follows_full:
            any_config = next(iter(self._configs.values()))
            everything = RequestOptions(enabled=False)
            request = self._engine.request(prefilled, any_config, everything)
            full = self._run(recording(prompt, logits, self._vocabulary), request)
        for method, config, options in asked:
            with self._operators():
                logits, request = self._engine.begin(prefilled, config, options)
            if prompt.continuation_token_ids:
                with self._operators():
                    yield method, predicted(prompt, logits, request.extend)
            elif full is not None:
                answer = following(prompt, logits, full, self._vocabulary)
                yield method, self._run(answer, request)
            else:
                yield method, self._run(answering(prompt, logits, self._vocabulary), request)

    def _run(self, answer: Generator[int, torch.Tensor, _T], request: CompressedRequest) -> _T:
        """What a generator returns that asks for one step after the other."""
        with self._operators():
            try:
                token_id = next(answer)
                while True:
                    token_id = answer.send(request.step(token_id))
            except StopIteration as finished:
                return cast("_T", finished.value)

    def _operators(self) -> AbstractContextManager[None]:
        return nullcontext() if self._compiled else reference_operators()
