# SPDX-License-Identifier: Apache-2.0
"""Which prompt queries of a step are accumulated into the global scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ems_vllm.engine.host_tensors import pad_rows, to_device

if TYPE_CHECKING:
    import torch

    from ems_vllm.engine.group_state import GroupStates
    from ems_vllm.engine.request_table import RunningRequest


@dataclass(frozen=True)
class ScoreRows:
    """Prompt chunks whose queries are accumulated; arguments of ops.score_queries by name."""

    block_table: torch.Tensor
    query_starts: torch.Tensor
    query_lens: torch.Tensor
    seq_lens: torch.Tensor
    accumulate_lens: torch.Tensor
    score_table: torch.Tensor


@dataclass(frozen=True)
class _Chunk:
    """The prompt queries of a request in a step that score.

    Attributes:
        request: Whose they are.
        query_start: Index of the first of them in the batch.
        first_query: Its position.
        seq_len: Position after the last of them.
        num_scored: Leading entries that have a score to add to.
    """

    request: RunningRequest
    query_start: int
    first_query: int
    seq_len: int
    num_scored: int


def _prompt_chunk(request: RunningRequest, query_start: int) -> _Chunk:
    # A request that was preempted may hit less than at first, and it computes generated tokens
    # again too: the queries that scored at first are the ones that count.
    num_first_hit = request.info.num_first_hit
    first_query = max(request.num_computed, num_first_hit)
    end = request.num_computed + request.num_scheduled
    return _Chunk(
        request,
        query_start + first_query - request.num_computed,
        first_query,
        min(end, request.info.prompt_len),
        # The first chunk that scores overwrites what an earlier owner of a page left behind.
        0 if request.num_computed <= num_first_hit else request.num_computed,
    )


def score_rows(
    rows: Sequence[tuple[RunningRequest, int]],
    states: GroupStates,
    group_id: int,
    block_size: int,
    device: torch.device,
) -> ScoreRows | None:
    """The prompt chunks of a batch that belong to requests whose prompt will be compressed.

    Args:
        rows: Requests of the batch and where their queries start in it.
        states: States of the requests in the group.
        group_id: Index of the group.
        block_size: Tokens per block.
        device: Of the result.

    Returns:
        None when there is no such chunk.
    """
    chosen: list[_Chunk] = []
    for request, query_start in rows:
        if states[request].plan.compresses_prompt:
            chunk = _prompt_chunk(request, query_start)
            if chunk.first_query < chunk.seq_len:
                chosen.append(chunk)
    if not chosen:
        return None
    columns = [
        chunk.request.block_ids[group_id][: -(-chunk.seq_len // block_size)] for chunk in chosen
    ]
    pages = [states[c.request].pages(ids) for c, ids in zip(chosen, columns, strict=True)]
    return ScoreRows(
        block_table=pad_rows(columns, device),
        query_starts=to_device([chunk.query_start for chunk in chosen], device),
        query_lens=to_device([chunk.seq_len - chunk.first_query for chunk in chosen], device),
        seq_lens=to_device([chunk.seq_len for chunk in chosen], device),
        accumulate_lens=to_device([chunk.num_scored for chunk in chosen], device),
        score_table=pad_rows(pages, device),
    )
