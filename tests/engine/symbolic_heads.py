# SPDX-License-Identifier: Apache-2.0
"""A worker's kv_heads that own different numbers of pages, beside the blocks of symbolic_cache.py.

The engine's own StepRunner runs over symbolic pages: it compacts, deals pages to heads, and
lays out the tables by which attention reads. What attention, or a compaction, would read of every
request, kv_head and layer is compared with what must be there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from engine.block_tables import Request
from engine.symbolic_cache import BLOCK_SIZE, Columns
from engine.symbolic_pages import ExpectedCompaction, SymbolicPages, SymbolicPolicy, Symbols

from ems_vllm.engine.attention.bindings import MetadataRewriter
from ems_vllm.engine.attention.head_batch import HeadBatch
from ems_vllm.engine.attention.live_columns import LiveColumns
from ems_vllm.engine.group.compressed_group import CompressedGroup
from ems_vllm.engine.group.head_tables import HeadTables
from ems_vllm.engine.group.layer_stack import LayerStack
from ems_vllm.engine.group.prompt_chunks import score_pages
from ems_vllm.engine.group.tensors import GroupTensors
from ems_vllm.engine.orders import attached
from ems_vllm.engine.worker.step import StepRunner

if TYPE_CHECKING:
    from ems_vllm.head_shares import HeadShares

TokenSymbols = Callable[[Request, int], Sequence[Any]]
"""For a request and a group, what every token must have written, from the first one on."""


class SymbolicHeads:
    """The kv_heads of all groups.

    Args:
        specs: Of the KV-cache groups.
        shares: Of the layers of each group.
        num_blocks: Size of the pool.
        max_num_seqs: Most requests that run at a time.
        max_num_columns: Width of block tables.

    Attributes:
        num_checked_rows: Requests, kv_heads and layers whose attention was checked.
    """

    def __init__(
        self,
        specs: Sequence[Any],
        shares: Sequence[Sequence[HeadShares]],
        num_blocks: int,
        max_num_seqs: int,
        max_num_columns: int,
    ) -> None:
        self.num_checked_rows = 0
        self._max_num_columns = max_num_columns
        scores = specs[0].observation.score_tokens is not None
        num_pages = num_blocks + sum(spec.num_score_pages for spec in specs) if scores else 0
        self.groups = [
            _Group(group_id, spec, of_layers, num_blocks, num_pages, max_num_seqs)
            for group_id, (spec, of_layers) in enumerate(zip(specs, shares, strict=True))
        ]
        self._order: list[str] = []
        groups = [group.compressed for group in self.groups]
        steps = self._steps = StepRunner(groups, lambda metadata: self._order)
        self._rewriters = []
        for group in groups:
            block_size, device = group.tensors.spec.block_size, group.tensors.device
            live = LiveColumns(block_size, max_num_seqs + 1, max_num_columns, device)
            batch = HeadBatch(group.heads, block_size, live.block_table, live.seq_lens)
            self._rewriters.append(MetadataRewriter(group, steps.batch, live, batch))

    @property
    def num_owners(self) -> int:
        """Requests whose heads own pages, in every group."""
        return sum(group.tables.num_owners for group in self.groups)

    def poison(self, block_ids: Sequence[int]) -> None:
        """Whatever was in blocks that are handed out is gone."""
        for group in self.groups:
            group.pages.poison(block_ids)

    def begin_step(self, output: Any, requests: dict[str, Request], tokens: TokenSymbols) -> None:
        """Obey the orders of a step before it runs, and check what its compactions read.

        Args:
            requests: Of the step, by id.
            tokens: Up to those computed before the step.
        """
        orders = attached(output)
        assert orders is not None
        for group in self.groups:
            for req_id in orders.ended:
                group.kept.pop(req_id, None)
            of_group = [order for order in orders.compactions if order.group_id == group.group_id]
            group.expect(of_group, requests, tokens)
        self._steps.begin_step(output)
        for group in self.groups:
            group.check_compacted()

    def write(self, request: Request, group_id: int, symbols: Sequence[Any]) -> None:
        """The tokens of a step."""
        group = self.groups[group_id]
        numbers = group.symbols.numbers(symbols)
        group.pages.write(request.tables[group_id], request.num_computed, numbers)

    def check(self, scheduled: Sequence[Request], tokens: TokenSymbols) -> None:
        """Compare all that attention reads in the step.

        Args:
            tokens: Up to the last one of the step.
        """
        # A model runner orders as it likes.
        requests = list(reversed(scheduled))
        self._order = [request.req_id for request in requests]
        for group, rewriter in zip(self.groups, self._rewriters, strict=True):
            metadata = self._metadata(requests, group.group_id)
            rows = rewriter.rewrite(metadata)
            expected = [
                group.expected(request, request.end, tokens(request, group.group_id))
                for request in requests
            ]
            for layer in range(group.num_layers):
                lens, table = rewriter.head_batch.write(layer)
                group.check_rows(layer, self._order, expected, lens.numpy(), table.numpy())
                assert rows.max_seq_len >= lens.max(), "a row is longer than was announced"
                assert (rows.seq_lens_cpu_upper_bound >= lens).all()
            self.num_checked_rows += len(requests) * group.num_heads * group.num_layers
        self._steps.end_step()

    def score(self, chunk: Any) -> None:
        """The queries of a ScoredChunk; those before it have left a score."""
        group = self.groups[chunk.group_id]
        positions = range(chunk.num_accumulated, chunk.seq_len)
        symbols = [_score(chunk.req_id, chunk.group_id, position) for position in positions]
        pages = score_pages(chunk.score_pages, chunk.block_ids)
        group.pages.score(pages, chunk.num_accumulated, group.symbols.numbers(symbols))

    def _metadata(self, requests: Sequence[Request], group_id: int) -> Any:
        """vLLM's, with a row that pads."""
        from vllm.v1.attention.backend import CommonAttentionMetadata

        table = torch.zeros((len(requests) + 1, self._max_num_columns), dtype=torch.int32)
        for row, request in enumerate(requests):
            of_group = torch.tensor(request.tables[group_id], dtype=torch.int32)
            table[row, : len(of_group)] = of_group
        query_lens = [request.num_scheduled for request in requests]
        starts = np.cumsum([0, *query_lens, 0]).astype(np.int32)
        seq_lens = torch.tensor([*(request.end for request in requests), 0], dtype=torch.int32)
        return CommonAttentionMetadata(
            query_start_loc=torch.from_numpy(starts),
            query_start_loc_cpu=torch.from_numpy(starts),
            seq_lens=seq_lens,
            num_reqs=len(requests) + 1,
            num_actual_tokens=sum(query_lens),
            max_query_len=max(query_lens),
            max_seq_len=int(seq_lens.max()),
            block_table_tensor=table,
            slot_mapping=torch.zeros(0, dtype=torch.int64),
            seq_lens_cpu_upper_bound=seq_lens.clone(),
        )


class _Group:
    """One KV-cache group.

    Attributes:
        kept: By request that was compressed, its columns and, by layer and head, its pages.
        num_unequal: Compactions after which heads own different numbers in every layer.
    """

    def __init__(
        self,
        group_id: int,
        spec: Any,
        shares: Sequence[HeadShares],
        num_blocks: int,
        num_score_pages: int,
        max_num_seqs: int,
    ) -> None:
        self.group_id = group_id
        self.num_layers, self.num_heads = len(shares), spec.num_kv_heads
        self.kept: dict[str, tuple[Columns, np.ndarray]] = {}
        self.num_unequal = 0
        self.symbols = Symbols(self.num_layers, self.num_heads)
        self.pages = SymbolicPages(self.num_layers, self.num_heads, num_blocks, num_score_pages)
        self.tables = HeadTables(
            len(shares), self.num_heads, max_num_seqs, torch.device("cpu"), shares
        )
        self._shares, self._settings = list(shares), spec.settings
        self._policy = SymbolicPolicy(self.symbols, self.num_heads)
        self._num_rows_due = 0
        # Layers that are not evenly spaced are more than one stack.
        stacks = [
            LayerStack(layers, self.pages.cache[layers], self.pages.cache[layers])
            for layers in (slice(0, 1), slice(1, self.num_layers))
        ]
        tensors = GroupTensors(
            group_id=group_id,
            spec=spec,
            stacks=stacks,
            scores=self.pages.scores,
            query_ring=None,
            scale=1.0,
            layer_scales=[],
            key_scales=None,
            query_dtype=torch.float32,
            rotations=range(self.num_layers),
            sample_stride=1,
            output_weights=(),
            layer_ids=range(self.num_layers),
            first_head=0,
            first_kv_head=0,
        )
        self.compressed = CompressedGroup(
            tensors,
            [f"layer {layer}" for layer in range(self.num_layers)],
            self._policy,
            workspace_bytes=0,
            heads=self.tables,
        )

    def expect(
        self, orders: Sequence[Any], requests: dict[str, Request], tokens: TokenSymbols
    ) -> None:
        """Compactions that come next."""
        compactions = []
        for order in orders:
            request = requests[order.req_id]
            of_tokens = tokens(request, self.group_id)
            _, held = self._kept(order.req_id)
            entries = self.expected(request, order.num_computed, of_tokens)
            scores = self._scores(order, held, entries)
            dealt = self._deal(order, request.prompt_len)
            self.num_unequal += bool((dealt.max(1) > dealt.min(1)).all())
            self.kept[order.req_id] = (order.first, order.tail), dealt
            left = self.expected(request, order.tail * BLOCK_SIZE, of_tokens)
            compactions.append(ExpectedCompaction(order, held, dealt, entries, scores, left))
        self._policy.expect(compactions)
        self._num_rows_due += len(orders) * self.num_layers * self.num_heads

    def check_compacted(self) -> None:
        """Every compaction was done, and those that were compressed, and only they, own pages."""
        assert self._policy.num_rows == self._num_rows_due
        assert self.tables.num_owners == len(self.kept), "a request has a place that must not"
        places = self.tables.places(self.kept)
        assert sorted(set(places)) == sorted(places), "two requests have the same place"
        assert not len(places) or places.min() > 0

    def expected(
        self, request: Request, num_tokens: int, symbols: Sequence[Any]
    ) -> list[list[np.ndarray]]:
        """By layer and head, numbers of the live entries of a request: kept ones, then tokens.

        Args:
            num_tokens: Tokens that are read.
            symbols: At least theirs.
        """
        (first, tail), pages = self._kept(request.req_id)
        of_tokens = self.symbols.numbers(symbols[tail * BLOCK_SIZE : num_tokens])
        longest = int(pages.max()) * BLOCK_SIZE
        of_kept = self.symbols.numbers(
            [("kept", request.req_id, first, tail, index) for index in range(longest)]
        )
        return [
            [
                np.concatenate([of_kept[layer, head, : count * BLOCK_SIZE], of_tokens[layer, head]])
                for head, count in enumerate(counts)
            ]
            for layer, counts in enumerate(pages)
        ]

    def check_rows(
        self,
        layer: int,
        req_ids: Sequence[str],
        expected: Sequence[list[list[np.ndarray]]],
        lens: np.ndarray,
        table: np.ndarray,
    ) -> None:
        """What attention reads in a layer.

        Args:
            req_ids: In the order of the batch.
            expected: Of each.
            lens, table: Of the rows, those that pad behind the others.
        """
        for at, (req_id, of_request) in enumerate(zip(req_ids, expected, strict=True)):
            for head, of_head in enumerate(of_request[layer]):
                row = at * self.num_heads + head
                found = self.pages.read(layer, table[row], lens[row])
                self.symbols.check(found, of_head, f"{req_id}, layer {layer}, kv_head {head}")
        assert not lens[len(req_ids) * self.num_heads :].any(), "a row that pads reads"

    def _kept(self, req_id: str) -> tuple[Columns, np.ndarray]:
        nothing = np.zeros((self.num_layers, self.num_heads), np.int64)
        return self.kept.get(req_id, ((0, 0), nothing))

    def _deal(self, order: Any, prompt_len: int) -> np.ndarray:
        """By layer and head, pages that are owned after a compaction."""
        num_columns = order.tail - order.first
        in_prompt = max(0, prompt_len - self._settings.recent_window) // BLOCK_SIZE
        dealt = np.array([of_layer.pages(num_columns, in_prompt) for of_layer in self._shares])
        assert (dealt.sum(1) == num_columns * self.num_heads).all()
        assert dealt.min() > 0
        return dealt

    def _scores(
        self, order: Any, held: np.ndarray, entries: list[list[np.ndarray]]
    ) -> list[list[np.ndarray]]:
        """By layer and head: kept entries have their score where they lie, or nothing has one."""
        if not order.num_scored:
            return [[of_head[:0] for of_head in of_layer] for of_layer in entries]
        if order.first_before:
            return [
                [of_head[: count * BLOCK_SIZE] for of_head, count in zip(*of_layer, strict=True)]
                for of_layer in zip(entries, held, strict=True)
            ]
        positions = range(order.num_scored)
        symbols = [_score(order.req_id, order.group_id, position) for position in positions]
        return [list(of_layer) for of_layer in self.symbols.numbers(symbols)]


def _score(req_id: str, group_id: int, position: int) -> tuple[Any, ...]:
    return ("score", req_id, group_id, position)
