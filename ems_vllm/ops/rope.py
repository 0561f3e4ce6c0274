# SPDX-License-Identifier: Apache-2.0
"""Undoing RoPE."""

import torch


def turned_back(keys: torch.Tensor, cos_sin: torch.Tensor | None, is_neox: bool) -> torch.Tensor:
    """Keys before RoPE, of which the first was at position 0.

    Paper: Su et al. 2021, RoFormer, arXiv:2104.09864.

    Args:
        keys: [..., num_keys, head_size], float.
        cos_sin, is_neox: see key_moments.

    Returns:
        Like keys; those at positions beyond the table, and what lies behind rotary_dim, are the
        same.
    """
    if cos_sin is None:
        return keys
    known, rotary_dim = min(len(cos_sin), keys.shape[-2]), cos_sin.shape[1]
    cos, sin = cos_sin[:known].to(keys.dtype).chunk(2, dim=-1)
    back = keys.clone()
    turned, into = (each[..., :known, :rotary_dim] for each in (keys, back))
    if is_neox:
        first, second = slice(rotary_dim // 2), slice(rotary_dim // 2, None)
    else:
        first, second = slice(None, None, 2), slice(1, None, 2)
    into[..., first] = turned[..., first] * cos + turned[..., second] * sin
    into[..., second] = turned[..., second] * cos - turned[..., first] * sin
    return back
