# SPDX-License-Identifier: Apache-2.0
"""Going on with a compressed cache, token by token."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from transformers import DynamicCache

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from peers.prefill import Branch


class Decoder:
    """The state of one answer; only the newest decoder of a model may be used.

    Args:
        model: Llama-like.
        prompt_len: Tokens of the prompt before compression; positions go on from there.
        branch: The compressed prompt.
    """

    def __init__(self, model: PreTrainedModel, prompt_len: int, branch: Branch) -> None:
        self._model = model
        self._position = prompt_len
        self._cache = DynamicCache()
        for index, (keys, values) in enumerate(branch.layers):
            # A copy: presses that keep everything, and those that hide entries by overwriting
            # them, share the tensors of the prefill.
            self._cache.update(keys, values, index)
            model.model.layers[index].self_attn.masked_key_indices = branch.masked[index]

    @torch.inference_mode()
    def step(self, token_id: int) -> torch.Tensor:
        """Logits after one more token, [vocabulary].

        Raises:
            ValueError: kvpress found no key that hides an entry from all queries of a kv_head.
        """
        device = self._model.device
        logits = self._model(
            torch.tensor([[token_id]], device=device),
            past_key_values=self._cache,
            position_ids=torch.tensor([[self._position]], device=device),
        ).logits
        self._position += 1
        return logits[0, -1]
