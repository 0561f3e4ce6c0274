# SPDX-License-Identifier: Apache-2.0
"""What RoPE did to keys and queries. Operators undo it for keys; here is the same for others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Rotation:
    """Rotary position embedding of a layer.

    Paper: Su et al. 2021, RoFormer, arXiv:2104.09864.

    Attributes:
        cos_sin: [num_positions, rotary_dim] - cosines of the rotary_dim / 2 angles of a position,
            then their sines.
        is_neox: Whether dimension i turns with i + rotary_dim / 2; otherwise 2 i with 2 i + 1.
    """

    cos_sin: Tensor
    is_neox: bool

    @property
    def rotary_dim(self) -> int:
        return self.cos_sin.shape[1]

    def at(self, positions: Tensor) -> Tensor:
        """[..., rotary_dim], float32, of positions [...]; the last known one beyond the table."""
        return self.cos_sin[positions.long().clamp(0, len(self.cos_sin) - 1)].float()

    def turn(self, vectors: Tensor, cos_sin: Tensor, *, back: bool = False) -> Tensor:
        """Turn vectors by angles, or undo it.

        Args:
            vectors: [..., head_size], float32.
            cos_sin: [..., rotary_dim], which broadcasts - of `at`, or means of it.
            back: Whether to turn by the negative angles.

        Returns:
            Like vectors; what lies behind rotary_dim is the same.
        """
        cos, sin = cos_sin.chunk(2, dim=-1)
        first, second = self.pairs(vectors)
        if back:
            sin = -sin
        turned = torch.empty_like(vectors)
        turned[..., self.rotary_dim :] = vectors[..., self.rotary_dim :]
        to_first, to_second = self.pairs(turned)
        to_first.copy_(first * cos - second * sin)
        to_second.copy_(second * cos + first * sin)
        return turned

    def pairs(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Views of the dimensions that turn with each other, each [..., rotary_dim / 2]."""
        turning = vectors[..., : self.rotary_dim]
        if self.is_neox:
            first, second = turning.chunk(2, dim=-1)
            return first, second
        return turning[..., 0::2], turning[..., 1::2]
