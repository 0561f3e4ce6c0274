# SPDX-License-Identifier: Apache-2.0
"""Times every operator on the CPU, beside its PyTorch reference and, for score_queries, SDPA.

    OMP_NUM_THREADS=1 python benchmarks/bench_ops.py --json bench.json

Before an operator is timed its result on the same arguments is compared with the reference; an
operator that is wrong gets no time. score_queries is compared on a shorter prompt, since its
reference builds the attention matrix. SDPA computes the attention of the same queries and keys,
which is what the engine does in the same step: the ratio is the cost of scoring relative to it.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import ems_vllm
from ems_vllm import ops
from ems_vllm.ops import reference

BLOCK_SIZE = 16
REFERENCE_LIMIT = 300


@dataclass(frozen=True)
class Model:
    """Attention shape of one layer; several layers where an operator takes all in one call."""

    name: str
    num_heads: int
    num_kv_heads: int
    head_size: int


MODELS = (
    Model("small", 8, 4, 64),
    Model("Qwen3-0.6B", 16, 8, 128),
    Model("Llama-3.1-8B/tp4", 8, 2, 128),
)
NUM_LAYERS = 4
WINDOW = 32


@dataclass
class Timing:
    """One line of the report; times in milliseconds."""

    op: str
    provider: str
    model: str
    length: int
    dtype: str
    p20_ms: float
    p50_ms: float
    p80_ms: float


@dataclass
class Workload:
    """One operator on one shape: arguments of the operator, and other providers of the same."""

    op: str
    args: tuple
    others: dict[str, Callable[[], object]]


def measure(run: Callable[[], object], repeats: int) -> tuple[float, float, float]:
    """20th, 50th and 80th percentile of the time of a call, in milliseconds."""
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - start))
    if len(times) == 1:
        return times[0], times[0], times[0]
    deciles = statistics.quantiles(times, n=10, method="inclusive")
    return deciles[1], statistics.median(times), deciles[7]


def one(value: int) -> torch.Tensor:
    return torch.tensor([value], dtype=torch.int32)


def score_queries_args(model: Model, length: int, dtype: torch.dtype) -> tuple:
    num_blocks = -(-length // BLOCK_SIZE)
    query = torch.randn(length, model.num_heads, model.head_size).to(dtype)
    key = torch.randn(num_blocks, model.num_kv_heads, BLOCK_SIZE, model.head_size).to(dtype)
    table = torch.randperm(num_blocks, dtype=torch.int32)[None]
    scores = torch.zeros(num_blocks, model.num_kv_heads, BLOCK_SIZE)
    lens = (one(0), one(length), one(length), one(0))
    return query, key, table, *lens, table, None, model.head_size**-0.5, scores


def sdpa(model: Model, args: tuple) -> Callable[[], object]:
    """Causal attention with the same queries and keys, laid out as it likes them."""
    query, key, table = args[:3]
    keys = key[table[0].long()].transpose(1, 2).flatten(0, 1)[: len(query)]
    group = model.num_heads // model.num_kv_heads
    keys = keys.transpose(0, 1).repeat_interleave(group, dim=0)[None]
    queries, values = query.transpose(0, 1)[None], torch.randn_like(keys)
    attention = torch.nn.functional.scaled_dot_product_attention
    return lambda: attention(queries, keys, values, is_causal=True)


def workloads(model: Model, length: int, dtype: torch.dtype) -> Iterator[Workload]:
    """Every operator, as one prompt of `length` that keeps a quarter makes them run."""
    args = score_queries_args(model, length, dtype)
    others = {"sdpa": sdpa(model, args)}
    if length <= REFERENCE_LIMIT:
        others["reference"] = lambda: reference.score_queries(*args)
    yield Workload("score_queries", args, others)
    # The denominators as an attention kernel would return them; their values do not matter here.
    lse = torch.full((length, model.num_heads), 10.0)
    with_lse = (*args[:8], lse, *args[9:])
    yield Workload("score_queries (lse)", with_lse, {"sdpa": others["sdpa"]})

    num_blocks = -(-length // BLOCK_SIZE)
    table = torch.randperm(num_blocks, dtype=torch.int32)[None]
    cache_shape = (NUM_LAYERS, num_blocks, model.num_kv_heads, BLOCK_SIZE, model.head_size)
    key, value = (torch.randn(cache_shape).add(0.5).to(dtype) for _ in range(2))
    budget, merges = length // 4, length // 8
    head_shape = (NUM_LAYERS, 1, model.num_kv_heads)
    scores = torch.rand(*head_shape, length)
    kept_idx = torch.empty(*head_shape, budget, dtype=torch.int32)
    merge_idx = torch.empty(*head_shape, merges, dtype=torch.int32)
    class_idx = torch.empty_like(merge_idx)
    ring = torch.randn(NUM_LAYERS, 1, WINDOW, model.num_heads, model.head_size).to(dtype)

    window = (ring, one(0), one(WINDOW), one(length), key, table, one(length), one(length))
    yield with_reference("score_window", (*window, model.head_size**-0.5, scores.clone()))

    query = torch.randn(256, model.num_heads, model.head_size).to(dtype)
    rings = torch.zeros(256, WINDOW, model.num_heads, model.head_size, dtype=dtype)
    yield with_reference("record_queries", (query, torch.arange(256) * WINDOW, rings))

    counts = (one(length), one(budget), one(4), one(merges))
    yield with_reference("select_entries", (scores, *counts, 1.0, kept_idx, merge_idx))

    ops.select_entries(scores, *counts, 1.0, kept_idx, merge_idx)
    selection = (table, kept_idx, merge_idx)
    yield with_reference(
        "assign_classes", (key, value, *selection, one(budget), one(4), 0.1, class_idx)
    )

    ops.assign_classes(key, value, *selection, one(budget), one(4), 0.1, class_idx)
    target = num_blocks - -(-budget // BLOCK_SIZE)
    merge = (scores, None, *selection, class_idx, one(budget), one(target))
    yield with_reference("merge_compact", (key, value, None, *merge))

    tables = torch.randint(0, 1000, (256, num_blocks), dtype=torch.int32)
    seq_lens = torch.full((256,), length, dtype=torch.int32)
    outputs = (torch.empty_like(tables), torch.empty_like(seq_lens))
    yield with_reference("plan_metadata", (tables, seq_lens, seq_lens // 64, 16, *outputs))


def with_reference(op: str, args: tuple) -> Workload:
    return Workload(op, args, {"reference": lambda: getattr(reference, op)(*args)})


def clone_args(args: tuple) -> tuple:
    return tuple(arg.clone() if isinstance(arg, torch.Tensor) else arg for arg in args)


def verify(op: str, args: tuple) -> None:
    """Raises AssertionError where operator and reference differ beyond rounding."""
    actual, expected = clone_args(args), clone_args(args)
    getattr(ops, op)(*actual)
    getattr(reference, op)(*expected)
    for got, want in zip(actual, expected, strict=True):
        if not isinstance(got, torch.Tensor):
            continue
        if op == "assign_classes" and got.dtype == torch.int32:
            # Rounding decides between classes that are almost equally good.
            assert (got != want).float().mean() < 0.01, f"{op}: classes differ"
        else:
            torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-3)


def report(timing: Timing) -> None:
    print(
        f"{timing.op:20} {timing.provider:10} {timing.model:17} {timing.length:6} "
        f"{timing.dtype:9} {timing.p20_ms:10.3f} {timing.p50_ms:10.3f} {timing.p80_ms:10.3f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 4000])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--models", nargs="+", default=[model.name for model in MODELS])
    parser.add_argument("--ops", nargs="+", help="operators to time; all by default")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path, help="file to write machine and timings to")
    options = parser.parse_args()

    torch.manual_seed(0)
    print(
        f"{'op':20} {'provider':10} {'model':17} {'length':>6} {'dtype':9} "
        f"{'p20 ms':>10} {'p50 ms':>10} {'p80 ms':>10}"
    )
    timings = []
    for model in (model for model in MODELS if model.name in options.models):
        for length in options.lengths:
            for name in options.dtypes:
                dtype = getattr(torch, name)
                for workload in workloads(model, length, dtype):
                    op = workload.op.split()[0]
                    if options.ops and op not in options.ops:
                        continue
                    if op == "score_queries":
                        short = min(length, REFERENCE_LIMIT)
                        verify(op, score_queries_args(model, short, dtype))
                    else:
                        verify(op, workload.args)
                    run = getattr(ops, op)
                    providers = {"ems_vllm": lambda run=run, w=workload: run(*w.args)}
                    for provider, call in (providers | workload.others).items():
                        repeats = 1 if provider == "reference" else options.repeats
                        times = measure(call, repeats)
                        timings.append(
                            Timing(workload.op, provider, model.name, length, name, *times)
                        )
                        report(timings[-1])
    if options.json:
        machine = {
            "processor": platform.processor() or platform.machine(),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "num_threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "ems_vllm": ems_vllm.build_info(),
        }
        result = {"machine": machine, "timings": [asdict(timing) for timing in timings]}
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
