# SPDX-License-Identifier: Apache-2.0
"""Measures variants on a prompt that is processed once."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import TYPE_CHECKING

from ems_vllm.config import RequestOptions
from ems_vllm.eval.lab.cells import Cell, prompt_digest
from ems_vllm.eval.lab.forcing import Forced, Measurement
from ems_vllm.eval.lab.journal import Record
from ems_vllm.eval.transformers_engine.attention import observed_by
from ems_vllm.eval.transformers_engine.attention_errors import (
    AttentionErrors,
    QueryRecorder,
    projections,
)
from ems_vllm.eval.transformers_engine.quantised import FORMATS, PLAIN, CacheFormat
from ems_vllm.ops import reference_operators

if TYPE_CHECKING:
    import torch

    from ems_vllm.config import KVCompressionConfig
    from ems_vllm.eval.records.prompt_files import PromptLine
    from ems_vllm.eval.transformers_engine.engine import TransformersEngine
    from ems_vllm.eval.transformers_engine.prefill import Prefilled


class Lab:
    """Measures with transformers.

    Args:
        engine: The model.
        compiled: Whether policies use the compiled operators.
        errors: Whether errors of attention are measured.

    Raises:
        ConfigError: the model's attention is not what `errors` needs.
    """

    def __init__(self, engine: TransformersEngine, compiled: bool, errors: bool) -> None:
        self._engine = engine
        self._compiled = compiled
        self._errors = errors
        if errors:
            projections(engine)

    def measure(self, prompt: PromptLine, forced: Forced, cells: Sequence[Cell]) -> Record:
        """One forward pass for the prompt in each format, and one for each cell from compaction to
        compaction.

        Args:
            prompt: What is asked.
            forced: Its answer.
            cells: At least one, all with room for the prompt; equal digests are measured once.
        """
        # By the format in which the prompt is processed; the first is the full cache's.
        asked: dict[str, list[tuple[Cell, RequestOptions]]] = {PLAIN: []}
        for cell in {cell.digest: cell for cell in cells}.values():
            options = cell.options(prompt, self._engine.block_size, self._engine.shape)
            assert options is not None
            asked.setdefault(cell.cache_format.prefill, []).append((cell, options))
        window = max(cell.config.obs_window for cell in cells)
        prefilled = self._prefill(prompt, asked[PLAIN], FORMATS[PLAIN], window)
        full, errors = self._full(prefilled, forced, cells[0].config)
        own = forced.measure(prefilled.logits, full, None)
        own = own.model_copy(update={"kv_bytes": self._bytes(prefilled.num_tokens, PLAIN)})
        measured = {}
        for name, group in asked.items():
            if name != PLAIN:
                prefilled = self._prefill(prompt, group, FORMATS[name], window)
            for cell, options in group:
                with self._operators():
                    found = self._cell(prefilled, forced, cell, options, full, errors)
                measured[cell.digest] = found
        return Record(prompt=prompt_digest(prompt), full=own, cells=measured)

    def _prefill(
        self,
        prompt: PromptLine,
        asked: Collection[tuple[Cell, RequestOptions]],
        cache_format: CacheFormat,
        num_queries: int,
    ) -> Prefilled:
        token_ids = prompt.prompt_token_ids
        needed = [
            self._engine.scored_queries(len(token_ids), cell.config, options)
            for cell, options in asked
        ]
        scored = {queries for queries in needed if queries is not None}
        return self._engine.prefill(token_ids, num_queries, scored, cache_format)

    def _bytes(self, num_entries: float, cache_format: str) -> float:
        return num_entries * FORMATS[cache_format].entry_bytes(self._engine.shape)

    def _full(
        self, prefilled: Prefilled, forced: Forced, any_config: KVCompressionConfig
    ) -> tuple[torch.Tensor, AttentionErrors | None]:
        """Log probabilities of the full cache, and what compares attention with it."""
        request = self._engine.request(prefilled, any_config, RequestOptions(enabled=False))
        recorder = QueryRecorder(self._engine.compressed_layers)
        with ExitStack() as stack:
            if self._errors:
                stack.enter_context(observed_by(recorder))
            logprobs = forced.logprobs(request.extend(forced.fed))
        if not self._errors:
            return logprobs, None
        return logprobs, AttentionErrors(self._engine, recorder.queries(), request)

    def _cell(
        self,
        prefilled: Prefilled,
        forced: Forced,
        cell: Cell,
        options: RequestOptions,
        full: torch.Tensor,
        errors: AttentionErrors | None,
    ) -> Measurement:
        logits, request = self._engine.begin(prefilled, cell.config, options, cell.cache_format)
        request.compress()
        kv_bytes = self._bytes(request.num_live, cell.cache_format.name)
        error = None
        if errors is not None:
            # From the next compaction on, of any level of layers, the entries are others.
            due = request.next_compaction()
            num_compared = len(forced.fed)
            if due is not None:
                num_compared = min(num_compared, due - prefilled.num_tokens)
            found = request.gaps()
            gaps = [found.get(layer) for layer in self._engine.compressed_layers]
            error = float(errors.by_layer(*request.entries(), num_compared, gaps).mean())
        logprobs = forced.logprobs(request.extend(forced.fed))
        measurement = forced.measure(logits, logprobs, full)
        return measurement.model_copy(update={"attention_error": error, "kv_bytes": kv_bytes})

    def _operators(self) -> AbstractContextManager[None]:
        return nullcontext() if self._compiled else reference_operators()
