# SPDX-License-Identifier: Apache-2.0
"""Runs vLLM's real engine in this process, with its block pool in view.

`engine(...)` builds an LLM on the CPU platform and yields an EngineProbe, which records at every
scheduling step what the tests assert about: blocks in use, live columns, writes.
"""

from __future__ import annotations

import gc
import os
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

# Within `engine` only: other tests start servers that must not inherit it.
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}

ROOT = Path(__file__).resolve().parents[2]
LLAMA = str(ROOT / "models" / "random-llama")
# A profile of it, in which heads of both halves are the best of a layer.
QUERY_HEADS = {
    "ratios": [0.5],
    "fractions": {layer: [0.5] for layer in range(4)},
    "query_heads": {
        0: [5, 2, 7, 0, 1, 3, 4, 6],
        1: [0, 1, 2, 3, 4, 5, 6, 7],
        2: [7, 6, 5, 0, 1, 2, 3, 4],
        3: [4, 1, 6, 3, 0, 2, 5, 7],
    },
}
QWEN3 = str(ROOT / "models" / "random-qwen3")
BLOCK_SIZE = 16


def tokens(length: int, seed: int = 0) -> list[int]:
    """A prompt of random token ids that depends on the seed only."""
    generator = random.Random(seed)
    return [generator.randrange(300, 2000) for _ in range(length)]


@dataclass
class EngineProbe:
    """A running engine.

    Attributes:
        used_blocks: Blocks in use after each scheduling step, vLLM's null block not counted.
        live_columns: (request id, columns it holds, tokens processed) after each step.
        num_preemptions: Preemptions so far.
    """

    llm: Any
    used_blocks: list[int] = field(default_factory=list)
    live_columns: list[tuple[str, int, int]] = field(default_factory=list)
    num_preemptions: int = 0

    @property
    def scheduler(self) -> Any:
        return self.llm.llm_engine.engine_core.engine_core.scheduler

    @property
    def pool(self) -> Any:
        return self.scheduler.kv_cache_manager.block_pool

    @property
    def managers(self) -> tuple[Any, ...]:
        return self.scheduler.kv_cache_manager.coordinator.single_type_managers

    @property
    def worker(self) -> Any:
        return self.llm.llm_engine.model_executor.driver_worker.worker

    def generate(
        self,
        prompts: Sequence[list[int]],
        max_tokens: int | Sequence[int] = 24,
        extra_args: dict[str, Any] | None = None,
        **sampling: Any,
    ) -> list[list[int]]:
        """Greedy answers to prompts of token ids, as token ids."""
        return [
            list(output.outputs[0].token_ids)
            for output in self.generate_outputs(prompts, max_tokens, extra_args, **sampling)
        ]

    def generate_outputs(
        self,
        prompts: Sequence[list[int]],
        max_tokens: int | Sequence[int] = 24,
        extra_args: dict[str, Any] | None = None,
        **sampling: Any,
    ) -> list[Any]:
        """vLLM's outputs of greedy requests; `sampling` overrides what makes them so."""
        from vllm import SamplingParams

        lengths = [max_tokens] * len(prompts) if isinstance(max_tokens, int) else list(max_tokens)
        common = {"temperature": 0, "ignore_eos": True, "extra_args": extra_args, **sampling}
        params = [SamplingParams(max_tokens=length, **common) for length in lengths]
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        return self.llm.generate(inputs, params, use_tqdm=False)

    def assert_pool_is_empty(self) -> None:
        """Every block but vLLM's null block is free, and nobody refers to one."""
        assert self.pool.get_num_free_blocks() == self.pool.num_gpu_blocks - 1
        assert all(block.ref_cnt == 0 for block in self.pool.blocks if not block.is_null)

    def stats(self) -> dict[str, int]:
        """Counters of the first compressed group."""
        return self.llm.collective_rpc("kv_compression_stats")[0][0]


@contextmanager
def engine(
    compression: dict[str, Any] | str | None,
    model: str = LLAMA,
    *,
    max_num_batched_tokens: int = 256,
    num_blocks: int | None = None,
    **engine_args: Any,
) -> Iterator[EngineProbe]:
    """An engine with or without compression; everything else equal.

    Args:
        compression: `additional_config["kv_compression"]`; None runs plain vLLM.
        model: Model folder.
        max_num_batched_tokens: Largest prompt chunk.
        num_blocks: Size of the pool; None for one that holds everything the tests ask for.
        engine_args: More arguments of vLLM's LLM.
    """
    with mock.patch.dict(os.environ, _ENVIRONMENT), _imports_left_alone():
        yield from _engine(compression, model, max_num_batched_tokens, num_blocks, engine_args)


@contextmanager
def _imports_left_alone() -> Iterator[None]:
    """Keep the garbage collector from what was imported before.

    As an engine starts and ends, vLLM collects eight times, through a million objects of modules
    that stay: two thirds of the time a start takes. So those are frozen here. vLLM freezes too,
    for a process that serves until it ends, and would take them back with its own.
    """
    import vllm  # noqa: F401

    gc.collect()
    gc.freeze()
    with mock.patch.object(gc, "freeze"), mock.patch.object(gc, "unfreeze"):
        yield


def _engine(
    compression: dict[str, Any] | str | None,
    model: str,
    max_num_batched_tokens: int,
    num_blocks: int | None,
    engine_args: dict[str, Any],
) -> Iterator[EngineProbe]:
    from vllm import LLM
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    arguments: dict[str, Any] = {
        "max_model_len": 8192,
        "max_num_seqs": 16,
        "block_size": BLOCK_SIZE,
        "dtype": "float32",
        "kv_cache_memory_bytes": 512 << 20,
        "max_num_batched_tokens": max_num_batched_tokens,
        "num_gpu_blocks_override": num_blocks,
        **engine_args,
    }
    if compression is not None:
        arguments["additional_config"] = {"kv_compression": compression}
    llm = LLM(model, **arguments)
    probe = EngineProbe(llm)
    try:
        _watch(probe)
        yield probe
    finally:
        llm.llm_engine.engine_core.shutdown()
        cleanup_dist_env_and_memory()


def _watch(probe: EngineProbe) -> None:
    scheduler = probe.scheduler
    schedule, preempt = scheduler.schedule, scheduler._preempt_request

    def recording_schedule(*args: Any, **kwargs: Any) -> Any:
        output = schedule(*args, **kwargs)
        probe.used_blocks.append(probe.pool.num_gpu_blocks - 1 - probe.pool.get_num_free_blocks())
        for manager in probe.managers[:1]:
            for req_id, blocks in manager.req_to_blocks.items():
                request = scheduler.requests.get(req_id)
                if request is None or req_id not in output.num_scheduled_tokens:
                    continue
                live = sum(not block.is_null for block in blocks)
                start = request.num_computed_tokens - output.num_scheduled_tokens[req_id]
                probe.live_columns.append((req_id, live, start))
        return output

    def counting_preempt(*args: Any, **kwargs: Any) -> Any:
        probe.num_preemptions += 1
        return preempt(*args, **kwargs)

    scheduler.schedule = recording_schedule
    scheduler._preempt_request = counting_preempt
