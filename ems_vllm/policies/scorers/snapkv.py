# SPDX-License-Identifier: Apache-2.0
"""Observation-window score of SnapKV."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field, field_validator
from torch import where
from torch.nn.functional import avg_pool1d

from ems_vllm.policies.base import SCORERS, Scorer, Scores

if TYPE_CHECKING:
    from torch import Tensor

    from ems_vllm.policies.context import CompactionContext


@SCORERS.register("snapkv")
class SnapKVScorer(Scorer):
    """Attention of the last `obs_window` queries, smoothed over neighbouring entries.

    Paper: Li et al. 2024, arXiv:2404.14469. Query heads of a kv_head are averaged, as public
    implementations for grouped-query attention do. Smoothing after a recompression runs over
    entries, which need no longer be neighbours in the text.
    """

    kernel_size: Annotated[int, Field(ge=1, le=63)] = 5
    """Width of the average pooling, odd; 1 switches it off."""

    @field_validator("kernel_size")
    @classmethod
    def _odd(cls, value: int) -> int:
        if value % 2 == 0:
            raise ValueError(f"the kernel has a centre; use {value - 1} or {value + 1}")
        return value

    @property
    def uses_window(self) -> bool:
        return True

    def score(self, context: CompactionContext) -> Scores:
        weights = context.window_scores()
        if self.kernel_size > 1:
            # Divided by the share of real entries under the kernel, so that a row's scores do not
            # depend on how much longer another row of the batch is.
            share = self._pool(context.is_entry[:, :, 0].float())[:, :, None]
            weights = where(context.is_entry, self._pool(weights) / share, 0.0)
        return Scores(weights)

    def _pool(self, values: Tensor) -> Tensor:
        """Moving average over the last dimension, zeros beyond its ends."""
        flat = values.flatten(0, -2).unsqueeze(1)
        pooled = avg_pool1d(flat, self.kernel_size, stride=1, padding=self.kernel_size // 2)
        return pooled.view_as(values)
