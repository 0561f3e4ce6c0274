# SPDX-License-Identifier: Apache-2.0
"""Lets a request prescribe its own answer, so that its probability can be measured.

    vllm serve MODEL --logits-processors ems_vllm.engine.measuring.forced_tokens:ForcedTokens
    {"prompt": ..., "max_tokens": 3, "logprobs": 0,
     "vllm_xargs": {"forced_token_ids": [17, 4, 92]}}

Everything but the prescribed token is masked when the token is sampled. vLLM takes its log
probabilities before such masks (`logprobs_mode=raw_logprobs`, the default), so they are the
model's own, and every token after the first is predicted from the cache as it is then: compressed.
Model Runner V2 has a replay of its own (`trace_decode_token_ids`), but no way to ask for it over
HTTP.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.sampling_params import SamplingParams
from vllm.v1.sample.logits_processor.builtin import process_dict_updates
from vllm.v1.sample.logits_processor.interface import BatchUpdate
from vllm.v1.sample.logits_processor.interface import LogitsProcessor as RunnerV1Processor
from vllm.v1.worker.gpu.sample.logits_processor.interface import (
    LogitsProcessor as RunnerV2Processor,
)

KEY = "forced_token_ids"


def forced_token_ids(params: SamplingParams) -> list[int] | None:
    """The answer that a request prescribes.

    Raises:
        ValueError: it is not a list of token ids.
    """
    value = (params.extra_args or {}).get(KEY)
    if value is None:
        return None
    if not isinstance(value, list) or not all(type(t) is int and t >= 0 for t in value):
        raise ValueError(
            f"vllm_xargs.{KEY}={str(value)[:200]} is not allowed: give a list of token ids."
        )
    return value


class ForcedTokens(RunnerV1Processor, RunnerV2Processor):
    """Masks all tokens but the prescribed one; a class for both of vLLM's model runners.

    Where the list ends the request goes on freely.
    """

    def __init__(self, vllm_config: Any, state: Any, is_pin_memory: bool = False) -> None:
        """`state` is the device with the V1 runner, its requests' state with V2."""
        # V1: row -> (prescribed, generated so far); the runner appends to the latter.
        self._rows: dict[int, tuple[list[int], list[int]]] = {}
        # V2: slot -> prescribed.
        self._slots: dict[int, list[int]] = {}
        self._state = state

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        forced_token_ids(sampling_params)

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """V1: follow the requests of the batch."""

        def added(
            params: SamplingParams, _: list[int] | None, generated: list[int]
        ) -> tuple[list[int], list[int]] | None:
            forced = forced_token_ids(params)
            return (forced, generated) if forced else None

        process_dict_updates(self._rows, batch_update, added)

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        """V2: a request takes a slot."""
        forced = forced_token_ids(sampling_params)
        self._slots.pop(req_idx, None)
        if forced:
            self._slots[req_idx] = forced
        return bool(forced)

    def apply(self, logits: torch.Tensor, ctx: Any = None) -> torch.Tensor:
        """Mask the rows whose next token is prescribed.

        Args:
            logits: [num_rows, vocab_size], float32.
            ctx: V2 only - which slot a row belongs to, and where it is.
        """
        for row, token_id in self._next_v1() if ctx is None else self._next_v2(ctx):
            # The frontend does not know the vocabulary here; the request goes on freely.
            if token_id >= logits.shape[1]:
                continue
            kept = logits[row, token_id].clone()
            logits[row].fill_(float("-inf"))
            logits[row, token_id] = kept
        return logits

    def _next_v1(self) -> list[tuple[int, int]]:
        return [
            (row, forced[len(generated)])
            for row, (forced, generated) in self._rows.items()
            if len(generated) < len(forced)
        ]

    def _next_v2(self, ctx: Any) -> list[tuple[int, int]]:
        if not self._slots:
            return []
        found = []
        slots, positions = ctx.expanded_idx_mapping.tolist(), ctx.pos.tolist()
        for row, (slot, position) in enumerate(zip(slots, positions, strict=True)):
            forced = self._slots.get(slot)
            if forced is None:
                continue
            index = position + 1 - int(self._state.prompt_len.np[slot])
            if 0 <= index < len(forced):
                found.append((row, forced[index]))
        return found
