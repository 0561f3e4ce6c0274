# SPDX-License-Identifier: Apache-2.0
"""Worker side of one KV-cache group: who is compressed how far, scoring, compaction, metadata."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from ems_vllm import ops
from ems_vllm.engine.host_tensors import pad_rows, to_device
from ems_vllm.engine.layer_stack import LayerStack, stack_layers
from ems_vllm.engine.score_pages import PrivatePages
from ems_vllm.policies.context import CompactionContext

if TYPE_CHECKING:
    from vllm.v1.attention.backend import CommonAttentionMetadata

    from ems_vllm._C import CompressionPlan
    from ems_vllm.engine.kv_cache_spec import CompressedAttentionSpec
    from ems_vllm.engine.request_table import RunningRequest
    from ems_vllm.policies.policy import Policy

# Live float32 tensors of the shape of a score during a compaction: weights, carry, window, and
# the temporaries of combining them.
_SCORE_TENSORS = 8


@dataclass
class _State:
    """Compression state of one request in one group.

    Attributes:
        plan: The same function that the scheduler computes.
        first, tail: Columns after the last compaction; 0, 0 before the first.
        score_pages: Private score pages of the columns that came from the prefix cache.
        num_carried: Leading live entries whose accumulated score was carried over.
    """

    plan: CompressionPlan
    first: int = 0
    tail: int = 0
    score_pages: list[int] = field(default_factory=list)
    num_carried: int = 0


@dataclass(frozen=True)
class _Due:
    """A compaction to run now, from columns [state.first, tail) into [first, tail)."""

    request: RunningRequest
    state: _State
    first: int
    tail: int

    @property
    def num_entries(self) -> int:
        return (self.tail - self.state.first) * self.state.plan.block_size


@dataclass(frozen=True)
class ScoreRows:
    """Prompt chunks of this step whose queries are accumulated; arguments of ops.score_queries."""

    block_table: torch.Tensor
    query_starts: torch.Tensor
    query_lens: torch.Tensor
    seq_lens: torch.Tensor
    accumulate_lens: torch.Tensor
    score_table: torch.Tensor


class CompressedGroup:
    """Compresses the layers of one KV-cache group.

    Args:
        group_id: Index of the group among the KV-cache groups.
        spec: Spec of its layers.
        layer_names: Its layers, in model order.
        caches: Their caches, [num_blocks, ...] each, in the same order.
        num_heads: Query heads of a layer on this rank.
        scale: Softmax scale of the layers.
        policy: What stays and what is merged.
        obs_window: Recorded queries per request.
        max_num_seqs: Rows of the query ring.
        max_num_reqs, max_num_tokens: Largest batch, CUDA-graph padding included.
        workspace_bytes: Bound of the scratch memory of a compaction.
        query_dtype: dtype of the queries.
    """

    def __init__(
        self,
        *,
        group_id: int,
        spec: CompressedAttentionSpec,
        layer_names: Sequence[str],
        caches: Sequence[torch.Tensor],
        num_heads: int,
        scale: float,
        policy: Policy,
        obs_window: int,
        max_num_seqs: int,
        max_num_reqs: int,
        max_num_tokens: int,
        max_num_columns: int,
        workspace_bytes: int,
        query_dtype: torch.dtype,
    ) -> None:
        self.group_id = group_id
        self.spec = spec
        self.layer_names = list(layer_names)
        self.policy = policy
        self.obs_window = obs_window
        self.device = caches[0].device
        self.scale = scale
        self._workspace_bytes = workspace_bytes
        self._stacks: list[LayerStack] = stack_layers(caches, spec.num_kv_heads)
        self._states: dict[str, _State] = {}
        self.num_compactions = 0
        self.num_entries_in = 0
        self.num_entries_kept = 0

        num_layers, num_blocks = len(caches), caches[0].shape[0]
        self.scores: torch.Tensor | None = None
        self._pages: PrivatePages | None = None
        if spec.num_prefix_score_pages is not None:
            self.scores = torch.zeros(
                (
                    num_layers,
                    num_blocks + spec.num_prefix_score_pages,
                    spec.num_kv_heads,
                    spec.block_size,
                ),
                dtype=torch.float32,
                device=self.device,
            )
            self._pages = PrivatePages(num_blocks, spec.num_prefix_score_pages)
        self.query_ring: torch.Tensor | None = None
        if policy.scorer.uses_window:
            self.query_ring = torch.zeros(
                (num_layers, max_num_seqs, obs_window, num_heads, spec.head_size),
                dtype=query_dtype,
                device=self.device,
            )
        # CUDA graphs capture the addresses of these three; they never move.
        self.ring_slots = torch.full((max_num_tokens,), -1, dtype=torch.int64, device=self.device)
        self._block_table = torch.zeros(
            (max_num_reqs, max_num_columns), dtype=torch.int32, device=self.device
        )
        self._seq_lens = torch.zeros((max_num_reqs,), dtype=torch.int32, device=self.device)

    # -- requests ------------------------------------------------------------------------------

    def admit(self, request: RunningRequest) -> None:
        """Start to follow a request that was just given blocks."""
        info = request.info
        plan = self.spec.settings.plan(info.prompt_len, self.spec.block_size, info.options)
        state = self._states[info.req_id] = _State(plan)
        if self._pages is not None and plan.compresses_prompt:
            state.score_pages = self._pages.take(request.num_cached // self.spec.block_size)

    def remove(self, req_id: str) -> None:
        """Forget a request that gave its blocks back."""
        state = self._states.pop(req_id)
        if self._pages is not None:
            self._pages.give_back(state.score_pages)

    def first_column(self, req_id: str) -> int:
        """First live column of a request, in this step."""
        return self._states[req_id].first

    # -- compaction ----------------------------------------------------------------------------

    @torch.inference_mode()
    def compact_due(self, requests: Sequence[RunningRequest]) -> None:
        """Compress every request of this step that is due, before the step's forward pass."""
        due = []
        for request in requests:
            state = self._states[request.info.req_id]
            first, tail = state.plan.columns(request.num_computed)
            if first > state.first:
                due.append(_Due(request, state, first, tail))
        if not due:
            return
        for wave, layers in self._waves(due):
            for stack in self._stacks:
                for part in _sub_stacks(stack, layers):
                    self.policy.compact(self._context(wave, part))
        for item in due:
            self._finish(item)

    def _finish(self, item: _Due) -> None:
        state = item.state
        self.num_compactions += 1
        self.num_entries_in += item.num_entries
        state.first, state.tail = item.first, item.tail
        if self._pages is not None:
            state.num_carried = (item.tail - item.first) * self.spec.block_size
            self._pages.give_back(state.score_pages)
        self.num_entries_kept += (item.tail - item.first) * self.spec.block_size

    def _waves(self, due: list[_Due]) -> list[tuple[list[_Due], int]]:
        """Split the work so that the score tensors of a wave fit the workspace.

        Returns:
            (requests, most layers at a time) of every wave; requests of similar length together,
            because a wave pads to its longest.
        """
        bytes_per_entry = 4 * _SCORE_TENSORS * self.spec.num_kv_heads
        max_entries = max(1, self._workspace_bytes // bytes_per_entry)
        num_layers = len(self.layer_names)
        waves: list[tuple[list[_Due], int]] = []
        wave: list[_Due] = []
        for item in sorted(due, key=lambda item: item.num_entries):
            if wave and (len(wave) + 1) * item.num_entries * num_layers > max_entries:
                waves.append((wave, num_layers))
                wave = []
            wave.append(item)
        waves.append((wave, num_layers))
        return [
            (wave, max(1, min(layers, max_entries // (len(wave) * wave[-1].num_entries))))
            for wave, layers in waves
        ]

    def _context(self, wave: list[_Due], stack: LayerStack) -> CompactionContext:
        block_size = self.spec.block_size
        columns = []
        pages = []
        num_scored = []
        for item in wave:
            ids = item.request.block_ids[self.group_id]
            stop = -(-item.request.num_computed // block_size)
            columns.append(ids[item.state.first : stop])
            private = item.state.score_pages
            pages.append((private + ids[len(private) :])[item.state.first : item.tail])
            if item.state.first > 0:
                num_scored.append(item.state.num_carried)
            elif self.scores is not None and item.state.plan.compresses_prompt:
                num_scored.append(min(item.num_entries, item.request.info.prompt_len))
            else:
                num_scored.append(0)
        budgets = [(item.tail - item.first) * block_size for item in wave]
        sinks = self.policy.selector.num_sink_tokens

        def ints(values: list[int]) -> torch.Tensor:
            return to_device(values, self.device)

        return CompactionContext(
            key_cache=stack.key_cache,
            value_cache=stack.value_cache,
            block_table=pad_rows(columns, self.device),
            num_entries=ints([item.num_entries for item in wave]),
            num_live=ints(
                [item.request.num_computed - item.state.first * block_size for item in wave]
            ),
            num_scored=ints(num_scored),
            budgets=ints(budgets),
            num_protected=ints([min(sinks, budget) for budget in budgets]),
            target_columns=ints([item.first - item.state.first for item in wave]),
            is_decode=to_device(
                [
                    item.state.first > 0 or item.request.num_computed > item.request.info.prompt_len
                    for item in wave
                ],
                self.device,
                torch.bool,
            ),
            max_entries=max(item.num_entries for item in wave),
            max_budget=max(budgets),
            scale=self.scale,
            paged_scores=None if self.scores is None else self.scores[stack.layers],
            score_table=None if self.scores is None else pad_rows(pages, self.device),
            query_ring=None if self.query_ring is None else self.query_ring[stack.layers],
            ring_rows=ints([item.request.ring_row for item in wave]),
            num_queries=ints(
                [
                    min(self.obs_window, item.request.num_computed - item.request.num_cached)
                    for item in wave
                ]
            ),
            end_positions=ints([item.request.num_computed for item in wave]),
        )

    # -- prefill scores ------------------------------------------------------------------------

    def score_rows(self, rows: Sequence[tuple[RunningRequest, int]]) -> ScoreRows | None:
        """The prompt chunks of this step whose attention is accumulated.

        Args:
            rows: Requests of the batch and where their queries start in it.
        """
        if self.scores is None:
            return None
        block_size = self.spec.block_size
        chosen = []
        for request, query_start in rows:
            state = self._states[request.info.req_id]
            if state.plan.compresses_prompt and request.num_computed < request.info.prompt_len:
                chosen.append((request, query_start, state.score_pages))
        if not chosen:
            return None
        query_lens = []
        seq_lens = []
        columns = []
        pages = []
        for request, _, private in chosen:
            # A resumed request recomputes generated tokens too; only prompt queries count.
            seq_len = min(request.num_computed + request.num_scheduled, request.info.prompt_len)
            ids = request.block_ids[self.group_id][: -(-seq_len // block_size)]
            query_lens.append(seq_len - request.num_computed)
            seq_lens.append(seq_len)
            columns.append(ids)
            pages.append(private + ids[len(private) :])
        return ScoreRows(
            block_table=pad_rows(columns, self.device),
            query_starts=to_device([start for _, start, _ in chosen], self.device),
            query_lens=to_device(query_lens, self.device),
            seq_lens=to_device(seq_lens, self.device),
            # The first chunk overwrites what an earlier owner of a page left behind.
            accumulate_lens=to_device(
                [
                    0 if request.num_computed == request.num_cached else request.num_computed
                    for request, _, _ in chosen
                ],
                self.device,
            ),
            score_table=pad_rows(pages, self.device),
        )

    # -- attention metadata --------------------------------------------------------------------

    def rewrite(
        self, metadata: CommonAttentionMetadata, first_columns: list[int], max_seq_len: int | None
    ) -> CommonAttentionMetadata:
        """Metadata in which every request begins at its first live column.

        Args:
            metadata: vLLM's, for the whole batch.
            first_columns: Of the leading rows; the remaining ones are padding.
            max_seq_len: Longest rewritten sequence, or None to keep vLLM's.
        """
        num_reqs = metadata.num_reqs
        block_table = self._block_table[:num_reqs, : metadata.block_table_tensor.shape[1]]
        seq_lens = self._seq_lens[:num_reqs]
        padded = first_columns + [0] * (num_reqs - len(first_columns))
        ops.plan_metadata(
            metadata.block_table_tensor,
            metadata.seq_lens,
            to_device(padded, self.device),
            self.spec.block_size,
            block_table,
            seq_lens,
        )
        upper_bound = metadata.seq_lens_cpu_upper_bound
        if upper_bound is not None:
            removed = torch.tensor(padded, dtype=upper_bound.dtype) * self.spec.block_size
            upper_bound = upper_bound - removed
        return metadata.replace(
            block_table_tensor=block_table,
            seq_lens=seq_lens,
            max_seq_len=metadata.max_seq_len if max_seq_len is None else max_seq_len,
            seq_lens_cpu_upper_bound=upper_bound,
            _num_computed_tokens_cache=None,
        )


def _sub_stacks(stack: LayerStack, max_layers: int) -> list[LayerStack]:
    """`stack` in parts of at most `max_layers` layers."""
    return [
        LayerStack(
            slice(
                stack.layers.start + at,
                min(stack.layers.start + at + max_layers, stack.layers.stop),
            ),
            stack.key_cache[at : at + max_layers],
            stack.value_cache[at : at + max_layers],
        )
        for at in range(0, stack.num_layers, max_layers)
    ]
