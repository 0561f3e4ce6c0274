# SPDX-License-Identifier: Apache-2.0
"""Which entries a model looks at when it says a text once more."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from ems_vllm.eval.transformers_engine.attention import observed_by
from ems_vllm.eval.transformers_engine.cache import fork
from ems_vllm.eval.transformers_engine.weights import attention_weights

if TYPE_CHECKING:
    from ems_vllm.eval.transformers_engine.engine import TransformersEngine

# Tokens of a forward pass.
_CHUNK = 1024


class PeakObserver:
    """Collects the most that each entry of a text receives from a later query; an Observer.

    Args:
        layers: Indices of the layers that are observed.
        num_entries: Leading entries that count: the text's.
        scale: Softmax scale.
    """

    def __init__(self, layers: Sequence[int], num_entries: int, scale: float) -> None:
        self._num_entries, self._scale = num_entries, scale
        self._peaks: dict[int, torch.Tensor | None] = dict.fromkeys(layers)

    def __call__(self, layer: int, queries: torch.Tensor, keys: torch.Tensor) -> None:
        """See attention.Observer."""
        if layer not in self._peaks:
            return
        peaks = peak_attention(queries, keys, self._num_entries, self._scale)
        before = self._peaks[layer]
        self._peaks[layer] = peaks if before is None else torch.maximum(before, peaks)

    def peaks(self) -> torch.Tensor:
        """[num_layers, num_kv_heads, num_entries], float32."""
        return torch.stack([peaks for peaks in self._peaks.values() if peaks is not None])


def peak_attention(
    queries: torch.Tensor, keys: torch.Tensor, num_entries: int, scale: float
) -> torch.Tensor:
    """Column maxima of the causal attention matrix, over the query heads of a kv_head too.

    Args:
        queries: [num_queries, num_heads, head_size] - of the last positions.
        keys: [num_kv_heads, num_keys, head_size].
        num_entries: Leading columns that are wanted; all of them lie before the queries.
        scale: Factor on the dot products.

    Returns:
        [num_kv_heads, num_entries], float32.
    """
    peaks = keys.new_zeros((keys.shape[0], num_entries), dtype=torch.float32)
    for weights in attention_weights(queries, keys, scale):
        peaks = torch.maximum(peaks, weights[..., :num_entries].amax(dim=(1, 2)))
    return peaks


@torch.inference_mode()
def reconstruction_peaks(
    model: TransformersEngine, text: Sequence[int], instruction: Sequence[int]
) -> torch.Tensor:
    """What repeating a text pays to its entries, at most.

    Paper: Kim et al. 2025, KVzip, arXiv:2505.23416: an entry matters as much as the most attention
    that it receives while the model, told to, repeats its context.

    Args:
        model: Of which all layers keep what they see.
        text: Token ids, with the special tokens that begin a text.
        instruction: Token ids that tell the model to repeat the text.

    Returns:
        [num_layers, num_kv_heads, len(text)], float32 - of the layers that are compressed.
    """
    prompt = model.prefill(text, num_queries=1)
    observer = PeakObserver(model.compressed_layers, len(text), model.scale)
    cache = fork(prompt.cache, prompt.cache.cache_format)
    repeated = [*instruction, *text]
    with observed_by(observer):
        for start in range(0, len(repeated), _CHUNK):
            chunk = repeated[start : start + _CHUNK]
            first = len(text) + start
            positions = torch.arange(first, first + len(chunk), device=model.model.device)
            model.model(
                torch.tensor([chunk], device=model.model.device),
                past_key_values=cache,
                position_ids=positions[None],
                logits_to_keep=1,
            )
    return observer.peaks()
