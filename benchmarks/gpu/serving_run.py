# SPDX-License-Identifier: Apache-2.0
"""One configuration of serving.py, in a process of its own.

Usage: python benchmarks/gpu/serving_run.py dense|ems|heads --model FOLDER --out FILE [--size tiny]

Where it is stopped from outside, it prints where it was.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gpu import smoke
from gpu.serving_sizes import CONFIGURATIONS, SIZES, Size


def run(name: str, size: Size, model: str, options: dict[str, Any]) -> dict[str, Any]:
    """One configuration, in this process."""
    from engine.harness import engine, tokens

    def prompts(count: int, length: int, seed: int) -> list[list[int]]:
        return [tokens(length, seed=seed + index) for index in range(count)]

    compression = size.compression(name)
    arguments: dict[str, Any] = {
        "dtype": size.dtype,
        "num_blocks": size.num_blocks,
        "max_num_batched_tokens": size.chunk,
        "max_model_len": size.max_model_len,
        "max_num_seqs": size.num_tight,
        "skip_tokenizer_init": True,
        **options,
    }
    started = time.perf_counter()
    with engine(compression, model, **arguments) as probe:
        watch = _StepWatch(probe)
        found: dict[str, Any] = {
            "start_seconds": time.perf_counter() - started,
            "runner": type(probe.worker.model_runner).__module__,
            "backend": _backend(probe.worker.model_runner),
        }
        identity = [tokens(length, seed=length) for length in size.identity_lens]
        found["answers"] = probe.generate(identity, size.interval, detokenize=False)
        new = size.num_new_tokens
        # The first long prompt compiles and tunes kernels.
        watch.measure(prompts(1, size.prompt_len, 1), new)
        found["tight"] = watch.measure(prompts(size.num_tight, size.prompt_len, 100), new)
        found["decode"] = watch.measure(prompts(size.num_decode, size.prompt_len, 200), new)
        short = size.budget + size.window - new
        if short > 0:
            found["decode_short"] = watch.measure(prompts(size.num_decode, short, 300), new)
        found["compactions"] = probe.stats()["num_compactions"] if compression else 0
        found["used_at_end"] = probe.pool.num_gpu_blocks - 1 - probe.pool.get_num_free_blocks()
    return found


class _StepWatch:
    """Times the engine's steps by when they are scheduled."""

    def __init__(self, probe: Any) -> None:
        self._probe = probe
        self._times: list[float] = []
        schedule = probe.scheduler.schedule

        def timed_schedule(*args: Any, **kwargs: Any) -> Any:
            self._times.append(time.perf_counter())
            return schedule(*args, **kwargs)

        probe.scheduler.schedule = timed_schedule

    def measure(self, prompts: Sequence[list[int]], num_new_tokens: int) -> dict[str, Any]:
        """Serve prompts together, and say what it took."""
        probe = self._probe
        probe.llm.reset_prefix_cache()
        self._times.clear()
        probe.used_blocks.clear()
        preemptions = probe.num_preemptions
        start = time.perf_counter()
        probe.generate(prompts, num_new_tokens, detokenize=False)
        seconds = time.perf_counter() - start
        intervals = [later - now for now, later in zip(self._times, self._times[1:], strict=False)]
        # Of the second half: nothing but decoding, unless requests had to wait for each other.
        late = intervals[len(intervals) // 2 :]
        return {
            "num_requests": len(prompts),
            "prompt_len": len(prompts[0]),
            "num_new_tokens": num_new_tokens,
            "seconds": seconds,
            "tokens_per_s": len(prompts) * num_new_tokens / seconds,
            "late_step_ms": 1e3 * statistics.median(late) if late else None,
            "peak_blocks": max(probe.used_blocks),
            "late_blocks": statistics.median(probe.used_blocks[len(probe.used_blocks) // 2 :]),
            "preemptions": probe.num_preemptions - preemptions,
        }


def _backend(runner: Any) -> str:
    return runner.attn_groups[0][0].backend.get_name()


def attention_backend() -> str:
    """FlashAttention 3 where it works on this GPU, else Triton."""
    try:
        from vllm.vllm_flash_attn import is_fa_version_supported

        if is_fa_version_supported(3):
            smoke.flash_attention()
            return "FLASH_ATTN"
    except Exception as error:
        print(f"without FlashAttention 3: {error!r}"[:500], flush=True)
    return "TRITON_ATTN"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("configuration", choices=CONFIGURATIONS)
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--size", choices=list(SIZES), default="gpu")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--eager", action="store_true", help="without CUDA graphs")
    options = parser.parse_args()
    faulthandler.enable()
    arguments: dict[str, Any] = {"enforce_eager": options.eager}
    if options.device == "cuda":
        os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "1")
        arguments["attention_backend"] = attention_backend()
        # The pool is given in blocks; this is only so that vLLM does not profile for more.
        arguments["kv_cache_memory_bytes"] = 16 << 30
    found = run(options.configuration, SIZES[options.size], options.model, arguments)
    options.out.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
