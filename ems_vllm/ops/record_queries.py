# SPDX-License-Identifier: Apache-2.0
"""The last queries of every request, in a ring buffer."""

import torch

from ems_vllm.ops.library import operator


@operator
def record_queries(query: torch.Tensor, ring_slots: torch.Tensor, ring: torch.Tensor) -> None:
    """Copy the queries of a batch into the ring buffer of the last queries of every request.

    Args:
        query: [num_tokens, num_heads, head_size], float.
        ring_slots: [num_tokens], int64 - ring row * obs_window + place in the window; negative
            for a token that is not recorded. No slot appears twice.
        ring: [num_ring_rows, obs_window, num_heads, head_size], float - one layer's ring.
    Mutates:
        ring: the slots named by ring_slots, bit for bit; no other slot.
    Raises:
        RuntimeError: a shape, dtype, device or stride is not as above; on the CPU also when a slot
            lies beyond the ring.
    Note: no host sync and no allocation, so CUDA graphs can capture it; deterministic.
    """
    window = ring.shape[1]
    for token, slot in enumerate(ring_slots.tolist()):
        if slot >= 0:
            ring[slot // window, slot % window] = query[token]
