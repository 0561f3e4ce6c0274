# SPDX-License-Identifier: Apache-2.0
"""KVzip at several budgets: the second reading, which scores, is done once for all of them."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from kvpress import KVzipPress
from transformers import AutoTokenizer, DynamicCache

from peers.branch import Branch, Entries
from peers.layers import attentions

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# It warns of its cost whenever it is built.
logging.getLogger("kvpress.presses.kvzip_press").setLevel(logging.ERROR)

_N = TypeVar("_N", bound=Hashable)


class _Budgets(KVzipPress):  # type: ignore[misc]
    """Notes what would be hidden at each ratio.

    Args:
        ratios: Of kvpress.

    Attributes:
        masked: By ratio, what is hidden of every layer.
    """

    def __init__(self, ratios: Sequence[float]) -> None:
        super().__init__(compression_ratio=max(ratios))
        self._ratios = ratios
        self.masked: dict[float, list[Any]] = {}

    def compress_post(self, model: PreTrainedModel) -> None:
        for ratio in self._ratios:
            self.compression_ratio = ratio
            modules = attentions(model)
            for module in modules:
                module.masked_key_indices = None
            super().compress_post(model)
            self.masked[ratio] = [module.masked_key_indices for module in modules]
            for module in modules:
                module.masked_key_indices = None


def kvzip_branches(
    model: PreTrainedModel,
    token_ids: Sequence[int],
    layers: Sequence[Entries],
    presses: Mapping[_N, KVzipPress],
) -> dict[_N, Branch]:
    """Compress a prompt that has been processed.

    Args:
        model: Without sliding windows, which KVzip refuses.
        token_ids: The prompt.
        layers: All of its entries.
        presses: By any name; their ratios count.
    """
    press = _Budgets([press.compression_ratio for press in presses.values()])
    cache = DynamicCache()
    for index, layer in enumerate(layers):
        cache.update(layer.keys, layer.values, index)
    with press(model):
        # What kvpress notes when it sees the prompt go by.
        press._context_ids = torch.tensor([token_ids])
        press._cache = cache
        press.prefix_length = prefix_length(model, token_ids, press.prefix_length)
    branches = {}
    for name, wanted in presses.items():
        masked = press.masked.get(wanted.compression_ratio, [None] * len(layers))
        kept = [
            Entries.of(layer.keys, layer.values, hidden)
            for layer, hidden in zip(layers, masked, strict=True)
        ]
        branches[name] = Branch(kept, len(token_ids))
    return branches


def prefix_length(model: PreTrainedModel, token_ids: Sequence[int], length: int) -> int:
    """Leading tokens that are the chat template's own: none where a prompt is without template.

    KVzip does not score them, so they are the first to go.
    """
    if length == 0:
        return 0
    tokenizer: Any = AutoTokenizer.from_pretrained(model.config.name_or_path)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "-"}], tokenize=False)
    template = tokenizer.encode(text, add_special_tokens=False)
    return length if list(token_ids[:length]) == template[:length] else 0
