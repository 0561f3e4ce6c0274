# SPDX-License-Identifier: Apache-2.0
"""What ranks of tensor parallelism decide together."""

from __future__ import annotations

import torch
from vllm.distributed.parallel_state import get_tp_group

from ems_vllm.engine.group.ranks import Ranks


def _gather(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The tensor of every rank that shares the layers of this one, in their order.

    Args:
        tensor: On the host, of the same shape on all ranks; a few numbers.
    """
    group = get_tp_group()
    if group.world_size == 1:
        return [tensor]
    gathered = [torch.empty_like(tensor) for _ in range(group.world_size)]
    torch.distributed.all_gather(gathered, tensor, group=group.cpu_group)
    return gathered


def _sum(tensor: torch.Tensor) -> tuple[torch.Tensor, int]:
    """The sum over the ranks that share the layers of this one, and how many they are."""
    group = get_tp_group()
    return group.all_reduce(tensor), group.world_size


RANKS = Ranks(_gather, _sum)
"""Those of vLLM's tensor parallelism."""
