# SPDX-License-Identifier: Apache-2.0
"""PyramidKV among the layers that are compressed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from kvpress import PyramidKVPress

from peers.layers import sliding_windows

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Pyramid(PyramidKVPress):  # type: ignore[misc]
    """Slopes over layers without a sliding window; the others would take from the mean."""

    def post_init_from_model(self, model: PreTrainedModel) -> None:
        windows = sliding_windows(model)
        self._compressed = [index for index, window in enumerate(windows) if window is None]

    def get_layer_budget(self, module: Any, q_len: int) -> int:
        among = SimpleNamespace(
            config=SimpleNamespace(num_hidden_layers=len(self._compressed)),
            layer_idx=self._compressed.index(module.layer_idx),
        )
        return int(super().get_layer_budget(among, q_len))
