# SPDX-License-Identifier: Apache-2.0
"""Reference of record_queries."""

import torch


def record_queries(query: torch.Tensor, ring_slots: torch.Tensor, ring: torch.Tensor) -> None:
    """See ems_vllm.ops.record_queries."""
    window = ring.shape[1]
    for token, slot in enumerate(ring_slots.tolist()):
        if slot >= 0:
            ring[slot // window, slot % window] = query[token]
