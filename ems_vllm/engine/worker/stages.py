# SPDX-License-Identifier: Apache-2.0
"""Carries from stage to stage of a pipeline what a coverage has decided.

All stages share a request's blocks, so a block is free only where none of them holds it. The first
stage that has layers of a group decides, by these; the others keep as much. What it decides goes
the way of the hidden states, ahead of them: no stage waits for what it would not wait for anyway.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch
from vllm.distributed.parallel_state import get_pp_group

UNDECIDED = -1
# vLLM's own messages between stages have the tag 0.
_TAG = 412


class Stage:
    """The only one of a model that is not in a pipeline.

    Attributes:
        is_last: Whether its output goes to the scheduler.
    """

    is_last = True

    def received(self, num_compactions: int) -> list[int]:
        """What earlier stages have decided of the compactions of a step.

        Returns:
            By compaction, the first column of what is kept, or UNDECIDED.
        """
        return [UNDECIDED] * num_compactions

    def pass_on(self, first_columns: Sequence[int]) -> None:
        """Tell the next stage, without waiting for it.

        Args:
            first_columns: As `received`, for the same compactions.
        """


class PipelineStage(Stage):
    """One of several, between the one before it and the one behind it."""

    def __init__(self) -> None:
        self._group = get_pp_group()
        self._rank = self._group.rank_in_group
        self._sent: deque[tuple[torch.distributed.Work, torch.Tensor]] = deque()
        self.is_last = bool(self._group.is_last_rank)

    def received(self, num_compactions: int) -> list[int]:
        if self._group.is_first_rank or not num_compactions:
            return super().received(num_compactions)
        message = torch.empty(num_compactions, dtype=torch.int64)
        source, group = self._group.ranks[self._rank - 1], self._group.cpu_group
        torch.distributed.recv(message, source, group, _TAG)
        decided: list[int] = message.tolist()
        return decided

    def pass_on(self, first_columns: Sequence[int]) -> None:
        if self.is_last or not first_columns:
            return
        # A message must stay until it is read. At most one step more than there are stages is under
        # way (VllmConfig.max_concurrent_batches), so what is waited for here has been read.
        while len(self._sent) > self._group.world_size:
            self._sent.popleft()[0].wait()
        message = torch.tensor(first_columns, dtype=torch.int64)
        target, group = self._group.ranks[self._rank + 1], self._group.cpu_group
        sent = torch.distributed.isend(message, target, group, _TAG)
        if sent is not None:
            self._sent.append((sent, message))
