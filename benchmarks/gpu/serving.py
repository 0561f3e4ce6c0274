# SPDX-License-Identifier: Apache-2.0
"""Serves a random Llama with vLLM, dense and compressed, and compares.

Usage: python benchmarks/gpu/serving.py --out serving.json [--size tiny --device cpu]

Each configuration runs in a process of its own, with the same pool, prompts and scheduling:

    identity      prompts within the budget: the tokens must be the same
    tight         more long prompts than the dense pool holds: throughput, blocks, preemptions
    decode        as many long prompts as both hold: the time of a decoding step
    decode_short  as many prompts as long as a compressed request: a step at that length

Succeeds when the tokens are the same, long requests were compressed, every block is free at the
end, and compressed requests held fewer. Times are reported, not judged.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
BLOCK_SIZE = 16
CONFIGURATIONS = ("dense", "ems")


@dataclass(frozen=True)
class Size:
    """What is served.

    Attributes:
        model: Fields of LlamaConfig.
        budget, window, interval: Settings of the compression.
        num_tight: Long prompts at a time; the dense pool holds `num_decode` of them.
    """

    model: dict[str, int]
    dtype: str
    budget: int
    window: int
    interval: int
    prompt_len: int
    num_new_tokens: int
    num_tight: int
    num_decode: int
    identity_lens: tuple[int, ...]
    chunk: int

    @property
    def max_model_len(self) -> int:
        return self.prompt_len + self.num_new_tokens

    @property
    def num_blocks(self) -> int:
        """Of the pool; the last one is vLLM's null block."""
        return self.num_decode * -(-self.max_model_len // BLOCK_SIZE) + 1

    def compression(self) -> dict[str, Any]:
        """For `additional_config`."""
        return {
            "recipe": "ems",
            "budget": self.budget,
            "recent_window": self.window,
            "recompress_interval": self.interval,
        }


_COMMON = {"vocab_size": 32000, "max_position_embeddings": 32768}
SIZES = {
    "gpu": Size(
        model=_COMMON
        | {
            "num_hidden_layers": 16,
            "hidden_size": 2048,
            "intermediate_size": 5632,
            "num_attention_heads": 16,
            "num_key_value_heads": 4,
            "head_dim": 128,
        },
        dtype="bfloat16",
        budget=1024,
        window=64,
        interval=128,
        prompt_len=8000,
        num_new_tokens=192,
        num_tight=32,
        num_decode=8,
        identity_lens=(1, 15, 16, 17, 500, 900),
        chunk=8192,
    ),
    "tiny": Size(
        model=_COMMON
        | {
            "num_hidden_layers": 2,
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 64,
        },
        dtype="float32",
        budget=64,
        window=32,
        interval=16,
        prompt_len=300,
        num_new_tokens=24,
        num_tight=4,
        num_decode=2,
        identity_lens=(1, 16, 17, 60),
        chunk=256,
    ),
}


def make_model(size: Size, folder: Path) -> None:
    """A Llama with random weights, without a tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(**size.model, initializer_range=0.05, tie_word_embeddings=False)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlamaForCausalLM(config)
    model.to(getattr(torch, size.dtype)).save_pretrained(folder)


def run(name: str, size: Size, model: str, options: dict[str, Any]) -> dict[str, Any]:
    """One configuration, in this process."""
    sys.path.insert(0, str(ROOT / "tests"))
    from engine.harness import engine, tokens

    def prompts(count: int, length: int, seed: int) -> list[list[int]]:
        return [tokens(length, seed=seed + index) for index in range(count)]

    compression = size.compression() if name == "ems" else None
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
    """FlashAttention 3 where vLLM has it for this GPU, else Triton."""
    try:
        from vllm.vllm_flash_attn import is_fa_version_supported

        return "FLASH_ATTN" if is_fa_version_supported(3) else "TRITON_ATTN"
    except Exception:
        return "TRITON_ATTN"


def verdict(runs: dict[str, dict[str, Any]]) -> list[str]:
    """What is wrong; empty when all is well."""
    dense, ems = runs["dense"], runs["ems"]
    wrong = []
    if dense["answers"] != ems["answers"]:
        wrong.append("within the budget, tokens differ from dense vLLM's")
    if ems["compactions"] == 0:
        wrong.append("no request was compressed")
    if dense["used_at_end"] or ems["used_at_end"]:
        wrong.append("blocks are in use although no request is left")
    if ems["decode"]["late_blocks"] >= dense["decode"]["late_blocks"]:
        wrong.append("compressed requests hold as many blocks as dense ones")
    return wrong


def in_processes(
    options: argparse.Namespace, model: str, eager: bool
) -> dict[str, dict[str, Any]] | None:
    """Every configuration in a process of its own; None when one fails."""
    runs = {}
    for name in CONFIGURATIONS:
        with tempfile.NamedTemporaryFile(suffix=".json") as file:
            command = [sys.executable, __file__, "--out", file.name, "--size", options.size]
            command += ["--device", options.device, "--worker", name, "--model", model]
            command += ["--eager"] if eager else []
            print(f"{name}{', without CUDA graphs' if eager else ''}", flush=True)
            if subprocess.run(command).returncode != 0:
                return None
            runs[name] = json.loads(Path(file.name).read_text())
    return runs


def work(options: argparse.Namespace) -> None:
    """The process of one configuration."""
    arguments: dict[str, Any] = {"enforce_eager": options.eager}
    if options.device == "cuda":
        os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "1")
        arguments["attention_backend"] = attention_backend()
        # The pool is given in blocks; this is only so that vLLM does not profile for more.
        arguments["kv_cache_memory_bytes"] = 16 << 30
    found = run(options.worker, SIZES[options.size], options.model, arguments)
    options.out.write_text(json.dumps(found))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--size", choices=list(SIZES), default="gpu")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--eager", action="store_true", help="without CUDA graphs")
    parser.add_argument("--worker", choices=CONFIGURATIONS, help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options)
        return 0
    size = SIZES[options.size]
    with tempfile.TemporaryDirectory() as folder:
        make_model(size, Path(folder))
        eager = options.eager
        runs = in_processes(options, folder, eager)
        wrong = []
        if runs is None and not eager and options.device == "cuda":
            # A second try says whether graphs are to blame; it is a failure all the same.
            wrong.append("it fails with CUDA graphs")
            eager = True
            runs = in_processes(options, folder, eager)
    if runs is None:
        print("NOT PASSED: a configuration failed")
        return 1
    wrong += verdict(runs)
    report = {
        "size": options.size,
        "cuda_graphs": options.device == "cuda" and not eager,
        "compression": size.compression(),
        "num_blocks": size.num_blocks,
        "tokens_identical": runs["dense"]["answers"] == runs["ems"]["answers"],
        "wrong": wrong,
        "runs": {
            name: {key: value for key, value in found.items() if key != "answers"}
            for name, found in runs.items()
        },
    }
    options.out.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report["runs"], indent=2))
    for sentence in wrong:
        print(f"NOT PASSED: {sentence}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
