# SPDX-License-Identifier: Apache-2.0
"""What RoPE did to keys; operators undo it."""

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
