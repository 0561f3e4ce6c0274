# SPDX-License-Identifier: Apache-2.0
"""vLLM's TRITON_ATTN over rows of one kv_head each, in a process that has Triton's interpreter."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from vllm.config import CUDAGraphMode
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.triton_attn import TritonAttentionImpl

from ems_vllm.engine.attention.head_batch import HeadBatch
from ems_vllm.engine.attention.head_rows import SPLITTINGS, LayerRows
from ems_vllm.engine.attention.triton_attn import CompressedTritonAttentionBackend
from ems_vllm.engine.group.head_tables import HeadTables

BACKEND = "TRITON_ATTN"
NUM_LAYERS, NUM_HEADS, GROUP, HEAD_SIZE, BLOCK_SIZE = 2, 3, 2, 32, 16
MAX_NUM_REQS, NUM_COLUMNS = 8, 28
# Of the graphs that are captured; the largest decides how many decodes the 3D kernel takes.
CAPTURE_SIZES = [1, 2, 4]
NAN = float("nan")


@dataclass(frozen=True)
class Attended:
    """Attention of a batch in a layer.

    Attributes:
        difference: The largest from attention written out in float64; NaN where one reads what
            nobody owns, or leaves out what it has to write.
        scratch_rows: Rows whose segments the 3D kernel has written; 0 where the 2D kernel ran.
        num_scratch_rows: Rows that it has room for.
    """

    difference: float
    scratch_rows: int
    num_scratch_rows: int


class Rows:
    """A cache of random entries, of requests whose kv_heads own unequal numbers of pages.

    Args:
        requests: (live columns that were dealt, entries behind them, query tokens) of each request;
            as many rows as pad the batch behind them.
        num_padding: Rows without a request.
    """

    def __init__(self, requests: list[tuple[int, int, int]], num_padding: int) -> None:
        self.requests = requests
        self.random = np.random.default_rng(len(requests))
        torch.manual_seed(len(requests))
        num_reqs = len(requests)
        self.num_rows = num_reqs + num_padding
        self.req_ids = [f"request {row}" for row in range(num_reqs)]
        num_blocks = 1 + MAX_NUM_REQS * NUM_COLUMNS
        blocks = self.random.permutation(num_blocks - 1) + 1
        self.live_table = torch.from_numpy(blocks.reshape(MAX_NUM_REQS, -1).astype(np.int32))
        self.live_lens = torch.zeros(MAX_NUM_REQS, dtype=torch.int32)
        for row, (dealt, tail, _) in enumerate(requests):
            self.live_lens[row] = dealt * BLOCK_SIZE + tail
        # NaN wherever nothing has been written: an entry that is read by mistake shows.
        shape = (num_blocks, NUM_HEADS, BLOCK_SIZE, 2 * HEAD_SIZE)
        self.caches = [torch.full(shape, NAN) for _ in range(NUM_LAYERS)]
        self.heads = HeadTables(NUM_LAYERS, NUM_HEADS, MAX_NUM_REQS, torch.device("cpu"))
        self.owned = self._own()
        self.entries = {
            (layer, row, head): self._write(layer, row, head)
            for layer in range(NUM_LAYERS)
            for row in range(num_reqs)
            for head in range(NUM_HEADS)
        }
        self.batch = HeadBatch(self.heads, BLOCK_SIZE, self.live_table, self.live_lens)
        self.builder = builder()
        for name in ("output", "max", "expsum"):
            getattr(self.builder, f"softmax_segm_{name}").fill_(NAN)

    def _own(self) -> np.ndarray:
        """[num_layers, num_requests, num_heads]: pages, at random; those of a few own nothing."""
        owned = np.zeros((NUM_LAYERS, len(self.requests), NUM_HEADS), np.int64)
        for layer in range(NUM_LAYERS):
            for row, (dealt, _, _) in enumerate(self.requests):
                takers = self.random.integers(NUM_HEADS, size=dealt * NUM_HEADS)
                owned[layer, row] = np.bincount(takers, minlength=NUM_HEADS)
        compressed = [row for row, (dealt, _, _) in enumerate(self.requests) if dealt]
        # In another order than that of the rows, so that places differ from them.
        for row in reversed(compressed):
            self.heads.own([self.req_ids[row]], owned[:, [row]])
        return owned

    def _write(self, layer: int, row: int, head: int) -> torch.Tensor:
        """[num_entries, 2 * head_size]: what a kv_head holds, written where ops.head_pages says."""
        dealt, tail, _ = self.requests[row]
        of_heads = self.owned[layer, row]
        first = of_heads[:head].sum()
        slots = [divmod(int(page), NUM_HEADS) for page in range(first, first + of_heads[head])]
        slots += [(dealt + column, head) for column in range(-(-tail // BLOCK_SIZE))]
        entries = torch.randn(int(of_heads[head]) * BLOCK_SIZE + tail, 2 * HEAD_SIZE)
        for (column, slot), page in zip(slots, entries.split(BLOCK_SIZE), strict=True):
            self.caches[layer][self.live_table[row, column], slot, : len(page)] = page
        return entries

    def metadata(self) -> Any:
        """What the builder makes of the rows of the batch."""
        lens = [queries for _, _, queries in self.requests]
        starts = torch.zeros(self.num_rows + 1, dtype=torch.int32)
        starts[1:] = torch.tensor(lens + [0] * (self.num_rows - len(lens))).cumsum(0)
        common = CommonAttentionMetadata(
            query_start_loc=starts,
            query_start_loc_cpu=starts,
            seq_lens=self.live_lens[: self.num_rows],
            num_reqs=self.num_rows,
            num_actual_tokens=sum(lens),
            max_query_len=max(lens),
            max_seq_len=int(self.live_lens.max()),
            block_table_tensor=self.live_table[: self.num_rows],
            slot_mapping=torch.zeros(sum(lens), dtype=torch.int64),
        )
        return self.builder.build(0, self.batch.split(common, self.req_ids))

    def attend(self, layer: int, metadata: Any, num_padding_tokens: int = 0) -> Attended:
        """Attention of a layer, as a wrapped implementation runs it."""
        heads = NUM_HEADS * GROUP
        impl = TritonAttentionImpl(heads, HEAD_SIZE, HEAD_SIZE**-0.5, NUM_HEADS, None, None, "auto")
        rows = LayerRows(impl, BACKEND, self.batch, layer)
        num_tokens = sum(queries for _, _, queries in self.requests)
        # Among keys and values, as models project them.
        projected = torch.randn(num_tokens + num_padding_tokens, heads + 2 * NUM_HEADS, HEAD_SIZE)
        query = projected[:, :heads]
        output = torch.full((len(query), heads * HEAD_SIZE), NAN)
        scales = SimpleNamespace(_q_scale=None, _k_scale=torch.ones(()), _v_scale=torch.ones(()))
        key = value = None
        result = rows.attend(
            TritonAttentionImpl.forward,
            scales,
            query,
            key,
            value,
            self.caches[layer],
            metadata,
            output,
        )
        assert result is output
        assert output[num_tokens:].isnan().all()
        expected = self.expected(layer, query)
        difference = (output[:num_tokens].view_as(expected) - expected).abs().max()
        scratch = self.builder.softmax_segm_max.isnan().all(-1).all(-1)
        return Attended(float(difference), int((~scratch).sum()), len(scratch))

    def expected(self, layer: int, query: torch.Tensor) -> torch.Tensor:
        """[num_tokens, num_heads, head_size]: one query head of one token at a time, in float64."""
        tokens = []
        for row, (_, _, num_queries) in enumerate(self.requests):
            for behind in range(num_queries - 1, -1, -1):
                of_heads = []
                for head in range(NUM_HEADS * GROUP):
                    entries = self.entries[layer, row, head // GROUP].double()
                    keys, values = entries[: len(entries) - behind].chunk(2, dim=1)
                    logits = keys @ query[len(tokens), head].double() * HEAD_SIZE**-0.5
                    of_heads.append(logits.softmax(0) @ values)
                tokens.append(torch.stack(of_heads))
        return torch.stack(tokens)


def builder() -> Any:
    """vLLM's metadata builder, as a worker changes it for rows of one kv_head."""
    model = SimpleNamespace(
        get_num_attention_heads=lambda parallel: NUM_HEADS * GROUP,
        get_num_kv_heads=lambda parallel: NUM_HEADS,
        get_head_size=lambda: HEAD_SIZE,
        rswa_window=None,
    )
    compilation = SimpleNamespace(
        cudagraph_mode=CUDAGraphMode.FULL_AND_PIECEWISE,
        cudagraph_capture_sizes=CAPTURE_SIZES,
        static_forward_context={},
    )
    config = SimpleNamespace(
        model_config=model,
        parallel_config=None,
        compilation_config=compilation,
        # These two are looked at from 0.33 on.
        speculative_config=None,
        scheduler_config=SimpleNamespace(max_num_seqs=MAX_NUM_REQS),
    )
    made = CompressedTritonAttentionBackend.get_builder_cls()(
        SimpleNamespace(block_size=BLOCK_SIZE), [], config, torch.device("cpu")
    )
    SPLITTINGS[BACKEND].builder(made, NUM_HEADS)
    return made


def run(requests: list[tuple[int, int, int]], num_padding: int) -> list[list[float]]:
    """(difference, scratch rows, room for them) of each layer; arguments are those of Rows."""
    rows = Rows(requests, num_padding)
    metadata = rows.metadata()
    attended = [rows.attend(layer, metadata, num_padding) for layer in range(NUM_LAYERS)]
    return [[each.difference, each.scratch_rows, each.num_scratch_rows] for each in attended]
