# SPDX-License-Identifier: Apache-2.0
"""What RoPE did to keys, and undoing it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Rotation:
    """Rotary position embedding of the layers that are compressed together.

    Paper: Su et al. 2021, RoFormer, arXiv:2104.09864.

    Attributes:
        cos_sin: [num_positions, rotary_dim] - cosines of the rotary_dim / 2 angles of a position,
            then their sines.
        is_neox: Whether dimension i turns with i + rotary_dim / 2; otherwise 2 i with 2 i + 1.
    """

    cos_sin: Tensor
    is_neox: bool

    def undo(self, keys: Tensor, positions: Tensor) -> Tensor:
        """Keys as they were before, up to what scaling of RoPE there was.

        Args:
            keys: [..., head_size], float32; overwritten. What lies behind rotary_dim was
                not turned.
            positions: Of the keys, in a shape that broadcasts to theirs without the last dimension;
                at most num_positions - 1.

        Returns:
            `keys`.
        """
        cos, sin = self.cos_sin[positions].float().chunk(2, dim=-1)
        turned = keys[..., : self.cos_sin.shape[-1]]
        if self.is_neox:
            first, second = turned.chunk(2, dim=-1)
        else:
            first, second = turned[..., ::2], turned[..., 1::2]
        back = first * cos + second * sin, second * cos - first * sin
        first.copy_(back[0])
        second.copy_(back[1])
        return keys
