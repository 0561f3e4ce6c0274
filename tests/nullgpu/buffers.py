# SPDX-License-Identifier: Apache-2.0
"""Serves on the null GPU with kernels of ours that compute, and checks memory after each step."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch

# Of bfloat16 and float32, and nothing that a step would leave by chance.
POISON = 7936.0


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
    with engine(case["compression"], LLAMA, **arguments) as probe:
        compilation = probe.worker.vllm_config.compilation_config
        checks = _Checks(probe)
        with checks.installed():
            prompts = [tokens(length, seed=i) for i, (length, _) in enumerate(case["requests"])]
            probe.generate(prompts, [new for _, new in case["requests"]], detokenize=False)
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
        self._runtime = probe.worker.compression
        (self._group,) = self._runtime.groups
        self._rows: list[Any] = []
        self._first_columns: dict[str, int] = {}
        self.found: dict[str, Any] = {
            "steps of three": 0,
            "rows checked": 0,
            "rows of compressed requests": 0,
            "wrong tables": [],
            "slots checked": 0,
            "wrong slots": [],
            "prompts checked": 0,
            "wrong scores": [],
        }

    def installed(self) -> Any:
        from ems_vllm.engine.runtime import GroupBinding

        execute, rewrite = self._worker.execute_model, GroupBinding.rewrite

        def rewriting(binding: Any, metadata: Any) -> Any:
            lens = metadata.seq_lens.cpu()
            rewritten = rewrite(binding, metadata)
            rows = [request for request, _ in self._runtime.rows(metadata)]
            self._rows = [(row, row.num_computed, row.num_scheduled) for row in rows]
            self._check_tables(rewritten, lens)
            return rewritten

        def executing(output: Any) -> Any:
            self._poison()
            result = execute(output)
            if output.total_num_scheduled_tokens:
                self.found["steps of three"] += len(output.num_scheduled_tokens) == 3
                self._check_ring()
                self._check_scores()
            return result

        self._worker.execute_model = executing
        return mock.patch.object(GroupBinding, "rewrite", rewriting)

    def _check_tables(self, metadata: Any, lens_before: torch.Tensor) -> None:
        # vLLM computes lengths on the GPU, so they mean nothing here but what is taken off.
        tensors = self._group.tensors
        block_size = tensors.spec.block_size
        tables, lens = metadata.block_table_tensor.cpu(), metadata.seq_lens.cpu()
        for row, (request, num_computed, num_scheduled) in enumerate(self._rows):
            first = self._group.first_column(request)
            columns = -(-(num_computed + num_scheduled) // block_size)
            expected = request.block_ids[tensors.group_id][first:columns]
            taken_off = int(lens_before[row] - lens[row])
            got = tables[row, : len(expected)].tolist()
            self.found["rows checked"] += 1
            self.found["rows of compressed requests"] += first > 0
            if got != list(expected) or taken_off != first * block_size:
                self.found["wrong tables"].append([row, first, got, list(expected), taken_off])

    def _poison(self) -> None:
        """Everything that was recorded: what is written in this step then shows."""
        ring = self._group.tensors.query_ring
        ring.copy_(torch.full(ring.shape, POISON, dtype=ring.dtype))
        self._scores_before = self._scores()

    def _scores(self) -> torch.Tensor:
        """Their bits, since they may be NaN here."""
        return self._group.tensors.scores.cpu().view(torch.int32)

    def _check_ring(self) -> None:
        window = self._group.tensors.obs_window
        expected = {
            (request.ring_row, position % window)
            for request, num_computed, num_scheduled in self._rows
            for position in range(
                num_computed + max(0, num_scheduled - window), num_computed + num_scheduled
            )
        }
        ring = self._group.tensors.query_ring.cpu()
        for layer, recorded in enumerate(ring):
            got = {
                tuple(slot) for slot in (recorded != POISON).flatten(2).any(2).nonzero().tolist()
            }
            self.found["slots checked"] += len(expected)
            if got != expected:
                wrong = [layer, sorted(got - expected), sorted(expected - got)]
                self.found["wrong slots"].append(wrong)

    def _check_scores(self) -> None:
        """Pages of prompts that are scored change, and of requests that were compacted; no others.

        A compaction carries the scores of what stays to where it stays.
        """
        group_id = self._group.tensors.group_id
        changed = (
            (self._scores() != self._scores_before).flatten(2).any(2).any(0).nonzero().flatten()
        )
        allowed: set[int] = set()
        for request, num_computed, _ in self._rows:
            first = self._group.first_column(request)
            is_prompt = num_computed < request.info.prompt_len
            if is_prompt or first > self._first_columns.get(request.info.req_id, 0):
                pages = self._group._states[request].pages(request.block_ids[group_id])
                allowed.update(pages[first:])
            self.found["prompts checked"] += is_prompt
            self._first_columns[request.info.req_id] = first
        wrong = set(changed.tolist()) - allowed
        if wrong:
            self.found["wrong scores"].append(sorted(wrong))
