# SPDX-License-Identifier: Apache-2.0
"""What one press has made of a prompt."""

from __future__ import annotations

from dataclasses import dataclass

import torch

# Of kvpress: (batch, kv_head, entry) indices of the entries that attention is not to see.
Masked = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Entries:
    """The entries of one layer.

    Attributes:
        keys, values: [1, num_kv_heads, num_entries, head_size].
        visible: [1, num_kv_heads, num_entries], bool: which of them are there; None for all.
            Kv_heads with fewer entries than others are filled up.
        is_compressed: Whether the layer's cache grows with the prompt. Layers with a sliding
            window are left alone and not counted.
    """

    keys: torch.Tensor
    values: torch.Tensor
    visible: torch.Tensor | None = None
    is_compressed: bool = True

    @classmethod
    def of(cls, keys: torch.Tensor, values: torch.Tensor, masked: Masked | None) -> Entries:
        """What a press left: the tensors it returned, less the entries it hid."""
        if masked is None or masked[0].numel() == 0:
            return cls(keys, values)
        visible = torch.ones(keys.shape[:3], dtype=torch.bool, device=keys.device)
        visible[tuple(index.to(keys.device) for index in masked)] = False
        counts = visible.sum(-1)
        longest = int(counts.max())
        # Stable: entries stay in the order of their positions.
        order = visible.int().argsort(dim=-1, descending=True, stable=True)[:, :, :longest]
        index = order[..., None].expand(-1, -1, -1, keys.shape[-1])
        filled = torch.arange(longest, device=keys.device) < counts[..., None]
        return cls(keys.gather(2, index), values.gather(2, index), filled)

    @property
    def length(self) -> int:
        return self.keys.shape[2]

    @property
    def num_visible(self) -> int:
        """Entries of all kv_heads together."""
        if self.visible is None:
            return self.keys.shape[1] * self.length
        return int(self.visible.sum())


@dataclass(frozen=True)
class Branch:
    """A compressed prompt.

    Attributes:
        layers: In order.
        next_position: Of the first token after the prompt.
    """

    layers: list[Entries]
    next_position: int

    @property
    def longest(self) -> int:
        """Entries of the fullest kv_head."""
        return max((layer.length for layer in self.layers if layer.is_compressed), default=0)

    def entries_per_head(self) -> float:
        """Entries that attention sees, averaged over the kv_heads of compressed layers."""
        counted = [layer for layer in self.layers if layer.is_compressed]
        num_kv_heads = counted[0].keys.shape[1]
        return sum(layer.num_visible for layer in counted) / (num_kv_heads * len(counted))
