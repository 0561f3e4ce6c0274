# SPDX-License-Identifier: Apache-2.0
"""Random score: the control that any method has to beat."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ems_vllm.policies.base import SCORERS, Scorer, Scores

if TYPE_CHECKING:
    from ems_vllm.policies.context import CompactionContext


@SCORERS.register("random")
class RandomScorer(Scorer):
    """Uniform scores that depend on the seed, the layer, the kv_head and the entry only.

    Ours, as a control. A hash instead of a random generator, so that a request's result depends
    neither on what else is in the batch nor on how often something was compressed before.
    """

    seed: int = 0

    def score(self, context: CompactionContext) -> Scores:
        device = context.key_cache.device
        # Where kv_heads are rows they get the numbers that they would get in one row.
        num_rows = context.rows_together
        num_heads = num_rows * context.num_kv_heads
        # Entries of one head differ by 1 at any max_entries, so a longer row elsewhere in the
        # batch must not shift the numbers: combine the coordinates instead of flattening them.
        layers = list(context.layer_ids) or list(range(context.num_layers))
        layer = torch.tensor(layers, device=device).view(-1, 1, 1, 1, 1)
        head = torch.arange(num_heads, device=device).view(num_rows, context.num_kv_heads, 1)
        head += context.first_kv_head
        entry = torch.arange(context.max_entries, device=device)
        index = (layer * 1_000_003 + head) * 16_777_259 + entry
        index ^= self.seed * 2_654_435_769
        # [num_layers, groups of rows, rows of a group, num_kv_heads, max_entries]
        is_entry = context.is_entry.unflatten(1, (context.num_rows // num_rows, num_rows))
        return Scores(torch.where(is_entry, _uniform(index), 0.0).flatten(1, 2))


def _uniform(index: torch.Tensor) -> torch.Tensor:
    """A multiply-xorshift hash of int64 numbers, which are overwritten, to float32 in (0, 1)."""
    mask = 0xFFFFFFFF
    index &= mask
    for _ in range(2):
        index ^= index >> 16
        index *= 0x45D9F3B
        index &= mask
    index ^= index >> 16
    return index.double().add_(0.5).div_(2.0**32).float().clamp_(min=1e-9)
