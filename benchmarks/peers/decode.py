# SPDX-License-Identifier: Apache-2.0
"""Going on with a compressed cache, token by token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from transformers import DynamicCache

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from peers.prefill import Branch


class Decoder:
    """The state of answers to one prompt; only the newest decoder of a model may be used.

    Args:
        model: Llama-like.
        prompt_len: Tokens of the prompt before compression; positions go on from there.
        branches: The compressed prompt, once for each answer; all of the same shape, see
            Branch.shape.
    """

    def __init__(self, model: PreTrainedModel, prompt_len: int, branches: Sequence[Branch]) -> None:
        self._model = model
        self._position = prompt_len
        self._cache = DynamicCache()
        for index, pairs in enumerate(zip(*(branch.layers for branch in branches), strict=True)):
            # Copies: presses that keep everything, and those that hide entries by overwriting
            # them, share the tensors of the prefill.
            keys, values = (torch.cat(tensors) for tensors in zip(*pairs, strict=True))
            self._cache.update(keys, values, index)
            model.model.layers[index].self_attn.masked_key_indices = branches[0].masked[index]

    @torch.inference_mode()
    def step(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Logits after one more token of every answer, [num_answers, vocabulary].

        Raises:
            ValueError: kvpress found no key that hides an entry from all queries of a kv_head.
        """
        device = self._model.device
        logits = self._model(
            torch.tensor(token_ids, device=device)[:, None],
            past_key_values=self._cache,
            position_ids=torch.full((len(token_ids), 1), self._position, device=device),
        ).logits
        self._position += 1
        return logits[:, -1]
