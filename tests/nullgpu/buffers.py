# SPDX-License-Identifier: Apache-2.0
"""Serves on the null GPU with kernels of ours that compute, and checks memory after each step.

What must be there is derived from the settings and vLLM's own output (expected.py). Of the
scheduler's orders only the rows of the query ring and the private score pages are believed, for
they may be any; that nobody else holds them is checked.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
from engine.block_tables import Request
from nullgpu import stand_in
from nullgpu.expected import Expected, end

from ems_vllm.engine.orders import Compaction, ScoredChunk, StepOrders, attached

# Of bfloat16 and float32, and nothing that a step would leave by chance.
POISON = 7936.0
# Takes in whatever is added to it, so that it goes away only where a score begins anew.
SCORE_POISON = 1e30


def run_case(case: dict[str, Any]) -> dict[str, Any]:
    """What was checked and what was wrong."""
    from engine.harness import LLAMA, engine, tokens

    import ems_vllm

    arguments = {
        "dtype": "bfloat16",
        "attention_backend": "TRITON_ATTN",
        "max_model_len": 512,
        "max_num_seqs": 8,
        "num_blocks": 100,
        "skip_tokenizer_init": True,
    }
    # Graphs are captured on batches of no step, of which padding is to be written down, too.
    with stand_in.fills(), engine(case["compression"], LLAMA, **arguments) as probe:
        compilation = probe.worker.vllm_config.compilation_config
        checks = _Checks(probe)
        with checks.installed():
            prompts = [tokens(length, seed=i) for i, (length, _) in enumerate(case["requests"])]
            probe.generate(prompts, [new for _, new in case["requests"]], detokenize=False)
            # Begins as the longest of them did.
            shared, own, num_new = case["again"]
            prompt = max(prompts, key=len)[:shared] + tokens(own, seed=len(prompts))
            probe.generate([prompt], num_new, detokenize=False)
        probe.assert_pool_is_empty()
        return checks.found | {
            "library": ems_vllm.__file__,
            "mode": compilation.cudagraph_mode.name,
            "capture_sizes": compilation.cudagraph_capture_sizes,
            "compactions": probe.stats()["num_compactions"],
        }


class _Checks:
    """Compares buffers with what the host knows."""

    def __init__(self, probe: Any) -> None:
        self._worker = probe.worker
        (group,) = probe.worker.compression.groups
        self._tensors = group.tensors
        self._expected = Expected(group.tensors.spec, group.tensors.query_ring.obs_window)
        # What requests hold until their compaction.
        self._rows: dict[str, int] = {}
        self._private: dict[str, list[int]] = {}
        # Score pages of each request whose content is still needed.
        self._kept: dict[str, set[int]] = {}
        self.found: dict[str, Any] = {
            "steps of three": 0,
            "rows checked": 0,
            "rows of compressed requests": 0,
            "wrong tables": [],
            "compactions checked": 0,
            "wrong compactions": [],
            "slots checked": 0,
            "steps that record nothing": 0,
            "wrong slots": [],
            "chunks checked": 0,
            "chunks that go on": 0,
            "private pages": 0,
            "wrong scores": [],
        }

    def installed(self) -> Any:
        from ems_vllm.engine.attention.bindings import MetadataRewriter

        execute, rewrite = self._worker.execute_model, MetadataRewriter.rewrite

        def rewriting(binding: Any, metadata: Any) -> Any:
            lens = metadata.seq_lens.cpu()
            rewritten = rewrite(binding, metadata)
            self._check_tables(rewritten, lens)
            return rewritten

        def executing(output: Any) -> Any:
            for req_id in output.finished_req_ids:
                self._forget(req_id)
            self._expected.update(output)
            orders = attached(output)
            assert orders is not None
            self._poison_ring()
            scores = self._poison_scores()
            self._check_compactions(orders)
            result = execute(output)
            if self._requests:
                self.found["steps of three"] += len(self._requests) == 3
                self._check_ring(orders)
                self._check_scores(orders, scores)
            return result

        self._worker.execute_model = executing
        return mock.patch.object(MetadataRewriter, "rewrite", rewriting)

    @property
    def _requests(self) -> list[Request]:
        return list(self._expected.requests.values())

    def _forget(self, req_id: str) -> None:
        for held in (self._rows, self._private, self._kept):
            held.pop(req_id, None)

    # -- block tables --------------------------------------------------------------------------

    def _check_tables(self, metadata: Any, lens_before: torch.Tensor) -> None:
        # vLLM computes lengths on the GPU, so they mean nothing here but what is taken off.
        tables, lens = metadata.block_table_tensor.cpu(), metadata.seq_lens.cpu()
        batch = self._worker.model_runner.input_batch
        assert set(batch.req_ids[: batch.num_reqs]) == set(self._expected.requests)
        for row, req_id in enumerate(batch.req_ids[: batch.num_reqs]):
            request = self._expected.requests[req_id]
            first, expected = self._expected.first(request), self._expected.blocks(request)
            taken_off = int(lens_before[row] - lens[row])
            got = tables[row, : len(expected)].tolist()
            self.found["rows checked"] += 1
            self.found["rows of compressed requests"] += first > 0
            if got != expected or taken_off != first * self._expected.block_size:
                self.found["wrong tables"].append([row, first, got, expected, taken_off])

    # -- compactions ---------------------------------------------------------------------------

    def _check_compactions(self, orders: StepOrders) -> None:
        """Those that fall due are done, with the blocks, pages and queries that are in memory."""
        due = {
            request.req_id: self._due_compaction(request)
            for request in self._requests
            if self._expected.is_compacted(request)
        }
        ordered = {order.req_id: _described(order) for order in orders.compactions}
        across = [r.req_id for r in self._requests if end(r) > self._expected.due(r)]
        if ordered != due or across:
            self.found["wrong compactions"].append([repr(due), repr(ordered), across])
        self.found["compactions checked"] += len(due)
        for req_id in due:
            # A later compaction reads the scores of what this one keeps, where it is kept.
            self._forget(req_id)
            request = self._expected.requests[req_id]
            first, tail = self._expected.compacted(request)
            self._kept[req_id] = set(request.block_ids[first:tail])

    def _due_compaction(self, request: Request) -> tuple[object, ...]:
        before = self._expected.first_before(request)
        stop = self._expected.columns(request.num_computed)
        return (
            (before, *self._expected.compacted(request)),
            request.block_ids[before:stop],
            self._private.get(request.req_id, []),
            self._rows.get(request.req_id),
            self._expected.read_by_compaction(request),
        )

    # -- query ring ----------------------------------------------------------------------------

    def _poison_ring(self) -> None:
        """Everything that was recorded: what is written in this step then shows."""
        ring = self._tensors.query_ring.queries
        ring.copy_(torch.full(ring.shape, POISON, dtype=ring.dtype))

    def _check_ring(self, orders: StepOrders) -> None:
        window = self._tensors.query_ring.obs_window
        rows = {order.req_id: order.ring_row for order in orders.recorded}
        recorded = {r.req_id: self._expected.recorded(r) for r in self._requests}
        # A request keeps its row, and nobody else has it.
        wrong_rows = [
            (req_id, row)
            for req_id, row in rows.items()
            if self._rows.setdefault(req_id, row) != row
        ]
        if wrong_rows or len(set(self._rows.values())) != len(self._rows):
            self.found["wrong slots"].append([wrong_rows, dict(self._rows)])
        expected = {
            (rows.get(req_id, -1), position % window)
            for req_id, positions in recorded.items()
            for position in positions
        }
        self.found["steps that record nothing"] += not expected
        for layer, found in enumerate(self._tensors.query_ring.queries.cpu()):
            got = {tuple(slot) for slot in (found != POISON).flatten(2).any(2).nonzero().tolist()}
            self.found["slots checked"] += len(expected)
            if got != expected:
                wrong = [layer, sorted(got - expected), sorted(expected - got)]
                self.found["wrong slots"].append(wrong)

    # -- scores --------------------------------------------------------------------------------

    def _scores(self) -> torch.Tensor:
        """Their bits, since they may be NaN here: [layers, pages, ...]."""
        return self._tensors.scores.cpu().view(torch.int32).flatten(2)

    def _poison_scores(self) -> torch.Tensor:
        """All pages that nobody needs, as an earlier owner would have left them."""
        is_free = torch.ones(self._tensors.scores.shape[1], dtype=torch.bool)
        is_free[[page for pages in self._kept.values() for page in pages]] = False
        scores = self._tensors.scores.cpu()
        scores[:, is_free] = SCORE_POISON
        self._tensors.scores.copy_(scores)
        return self._scores()

    def _check_scores(self, orders: StepOrders, before: torch.Tensor) -> None:
        """Pages that are scored change, and those into which a compaction moves; no others."""
        ordered = {order.req_id: order for order in orders.scored}
        scoring = [r for r in self._requests if self._expected.scoring(r)]
        if set(ordered) != {request.req_id for request in scoring}:
            self.found["wrong scores"].append(["who scores", list(ordered)])
            return
        compacted = filter(self._expected.is_compacted, self._requests)
        allowed = {page for request in compacted for page in self._kept[request.req_id]}
        required: set[int] = set()
        for request in scoring:
            pages, new = self._scored_pages(request, ordered[request.req_id])
            allowed |= set(pages)
            required |= set(new)
        # [layers, pages]
        changed = (self._scores() != before).any(2)
        got = set(changed.any(0).nonzero().flatten().tolist())
        in_all_layers = set(changed.all(0).nonzero().flatten().tolist())
        if got - allowed or required - in_all_layers:
            wrong = [sorted(got - allowed), sorted(required - in_all_layers)]
            self.found["wrong scores"].append(wrong)

    def _scored_pages(self, request: Request, order: ScoredChunk) -> tuple[list[int], list[int]]:
        """Pages that a chunk scores, and those of them in which entries are new."""
        expected, queries = self._expected, self._expected.scoring(request)
        goes_on = request.req_id in self._private
        private = self._private.setdefault(request.req_id, order.score_pages)
        dealt = [page for pages in self._private.values() for page in pages]
        num_blocks, num_pages = self._tensors.num_blocks, self._tensors.scores.shape[1]
        if (
            range(order.first_query, order.seq_len) != queries
            or order.score_pages != private
            # Blocks from the prefix cache are read by others too, who score them otherwise.
            or len(private) != request.num_cached // expected.block_size
            or len(set(dealt)) != len(dealt)
            or not all(num_blocks <= page < num_pages for page in dealt)
        ):
            self.found["wrong scores"].append([repr(queries), repr(order), dealt])
        pages = [*private, *request.block_ids[len(private) : expected.columns(queries.stop)]]
        self._kept[request.req_id] = set(pages)
        self.found["chunks checked"] += 1
        self.found["chunks that go on"] += goes_on
        self.found["private pages"] += len(private)
        return pages, pages[request.num_computed // expected.block_size if goes_on else 0 :]


def _described(order: Compaction) -> tuple[object, ...]:
    """As `_Checks._due_compaction` says what is due."""
    return (
        (order.first_before, order.first, order.tail),
        order.block_ids,
        order.score_pages,
        order.ring_row,
        range(order.num_computed - order.num_queries, order.num_computed),
    )
