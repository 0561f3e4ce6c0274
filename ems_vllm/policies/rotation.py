# SPDX-License-Identifier: Apache-2.0
"""What RoPE did to keys, and undoing it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

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

    def undo(self, keys: Tensor, positions: slice) -> Tensor:
        """Keys as they were before, up to what scaling of RoPE there was.

        Args:
            keys: [..., num_positions, head_size], float32. What lies behind rotary_dim was not
                turned.
            positions: Consecutive ones; those beyond the table belong to no entry.

        Returns:
            Like keys.
        """
        cos, sin = self.cos_sin[positions].float().chunk(2, dim=-1)
        num_known = len(cos)
        # Of every dimension, so that one product goes through all of them.
        factors = keys.new_ones(keys.shape[-2:])
        for part in self._halves(factors[:num_known]):
            part.copy_(cos)
        back = keys * factors
        first, second = self._halves(keys[..., :num_known, :])
        into_first, into_second = self._halves(back[..., :num_known, :])
        into_first.addcmul_(second, sin)
        into_second.addcmul_(first, sin, value=-1)
        back[..., num_known:, :] = 0.0
        return back

    def _halves(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Dimensions that turn with each other."""
        turned = keys[..., : self.cos_sin.shape[-1]]
        if self.is_neox:
            first, second = turned.chunk(2, dim=-1)
            return first, second
        return turned[..., ::2], turned[..., 1::2]
