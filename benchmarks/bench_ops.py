# SPDX-License-Identifier: Apache-2.0
"""Times every operator beside PyTorch's own operations and beside attention, in one run.

    python benchmarks/bench_ops.py --json ops.json --csv ops.csv      on the GPU, where there is one
    OMP_NUM_THREADS=1 python benchmarks/bench_ops.py --device cpu

First every operator is compared with its reference on a small shape; where one is wrong nothing is
timed. Then the ceilings are measured: a large copy and a large matrix product. On a GPU times are
between events, with a cold second-level cache, and memory is allocated beforehand. "of ceiling" is
the least time by those ceilings over the time taken, "of target" the time allowed over the time
taken (docs/kernels.md); the attention of a layer is that of the fastest implementation at hand.
"""

import argparse
import shlex
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from opbench import attention, cases, ceilings, verify
from opbench.report import HEADER, Line, text, write_csv, write_json
from opbench.shapes import CPU_MODELS, LLAMA_8B, MAX_TOKENS, MODELS, Model, Shape
from opbench.timing import Timer, Times

import ems_vllm
from ems_vllm.eval.records import environment

GPU_LENGTHS = (4 << 10, 8 << 10, 32 << 10, 128 << 10)
GPU_ROWS = (1, 4, 16, 64)
CPU_LENGTHS = (256, 4000)
VERIFIED_LENGTH, VERIFIED_ROWS = 200, 2


def shapes(options: argparse.Namespace, device: torch.device) -> Iterator[Shape]:
    """What is to be timed; several requests only where their cache fits."""
    for name in options.models:
        for length in options.lengths:
            for num_rows in options.rows:
                if num_rows > 1 and num_rows * length > MAX_TOKENS:
                    continue
                for dtype in options.dtypes:
                    budget = cases.budget_of(length)
                    yield Shape(
                        MODELS[name], length, num_rows, budget, getattr(torch, dtype), device
                    )


def line_of(
    shape: Shape,
    case: cases.Case,
    provider: str,
    times: Times,
    rates: ceilings.Ceilings,
    bases: dict[str, float],
) -> Line:
    """A time with what it is to be compared with.

    Args:
        bases: Milliseconds of what targets are shares of, by name.
    """
    copy_ms = 1e3 * case.num_bytes / rates.copy_bytes_per_s
    matmul_ms = 1e3 * case.flops / rates.matmul_flops_per_s
    floor_ms = max(copy_ms, matmul_ms)
    target, target_ms = "", None
    if case.target is not None:
        base, share = case.target
        target = f"{share:.3g} x {base}"
        target_ms = share * {"floor": floor_ms, **bases}[base]
    return Line(
        op=case.op,
        variant=case.variant,
        provider=provider,
        model=shape.model.name,
        length=shape.length,
        num_rows=shape.num_rows,
        dtype=str(shape.dtype).removeprefix("torch."),
        **asdict(times),
        num_bytes=case.num_bytes,
        flops=case.flops,
        floor_ms=floor_ms,
        bound="matmul" if matmul_ms > copy_ms else "copy",
        of_ceiling=floor_ms / times.p50_ms,
        target=target,
        target_ms=target_ms,
        of_target=None if target_ms is None else target_ms / times.p50_ms,
    )


def run(
    shape: Shape, timer: Timer, rates: ceilings.Ceilings, wanted: Callable[[str], bool]
) -> Iterator[Line]:
    """The lines of one shape, attention first."""
    times = {name: timer(call) for name, call in attention.candidates(shape).items()}
    none = cases.Case("attention", "causal prompt", {}, 0.0, attention.flops(shape))
    for provider, measured in times.items():
        yield line_of(shape, none, provider, measured, rates, {})
    attention_ms = min(measured.p50_ms for measured in times.values())
    bases = {
        "attention": attention_ms,
        "attention, all layers": shape.model.num_layers * attention_ms,
        "decode step": 1e3 * cases.decode_step_bytes(shape) / rates.copy_bytes_per_s,
    }
    for case in cases.of_shape(shape):
        if not wanted(case.op):
            continue
        for provider, call in case.providers.items():
            try:
                measured = timer(call)
            except torch.OutOfMemoryError:
                print(f"{case.op}: {provider} needs more memory than there is")
                continue
            yield line_of(shape, case, provider, measured, rates, bases)


def parse(arguments: list[str] | None) -> tuple[argparse.Namespace, torch.device]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--lengths", type=int, nargs="+")
    parser.add_argument("--rows", type=int, nargs="+", help="requests at a time")
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--models", nargs="+", choices=list(MODELS))
    parser.add_argument("--ops", nargs="+", default=[], help="operators to time; all by default")
    parser.add_argument("--seconds", type=float, default=0.4, help="about so long per line")
    parser.add_argument("--json", type=Path, help="file to write everything to")
    parser.add_argument("--csv", type=Path, help="file to write the lines to")
    options = parser.parse_args(arguments)
    on_gpu = options.device == "cuda" or (options.device == "auto" and torch.cuda.is_available())
    models = (LLAMA_8B,) if on_gpu else CPU_MODELS
    options.models = options.models or [model.name for model in models]
    options.lengths = options.lengths or (GPU_LENGTHS if on_gpu else CPU_LENGTHS)
    options.rows = options.rows or (GPU_ROWS if on_gpu else (1,))
    options.dtypes = options.dtypes or (("bfloat16",) if on_gpu else ("float32", "bfloat16"))
    return options, torch.device("cuda" if on_gpu else "cpu")


def describe(device: torch.device, rates: dict[str, ceilings.Ceilings]) -> dict[str, Any]:
    """Where and how it was measured."""
    return {
        "command": shlex.join(["python", "benchmarks/bench_ops.py", *sys.argv[1:]]),
        "environment": environment.describe(),
        "device": device.type,
        "cuda": torch.version.cuda,
        "num_threads": torch.get_num_threads(),
        "build": ems_vllm.build_info(),
        "ceilings": {dtype: asdict(measured) for dtype, measured in rates.items()},
    }


def main(arguments: list[str] | None = None) -> None:
    options, device = parse(arguments)
    torch.manual_seed(0)
    timer = Timer(device, options.seconds)
    small = Model("verified", 2, 8, 2, 128)
    rates = {}
    for name in options.dtypes:
        dtype = getattr(torch, name)
        verify.check(Shape(small, VERIFIED_LENGTH, VERIFIED_ROWS, 32, dtype, device))
        rates[name] = ceilings.measure(timer, device, dtype)
        print(
            f"{name}: copy {rates[name].copy_bytes_per_s / 1e9:,.0f} GB/s, "
            f"product {rates[name].matmul_flops_per_s / 1e12:,.2f} TFLOP/s"
        )
    print(HEADER)
    lines = []
    try:
        for shape in shapes(options, device):
            rate = rates[str(shape.dtype).removeprefix("torch.")]
            wanted = lambda op: not options.ops or any(name in op for name in options.ops)  # noqa: E731
            for line in run(shape, timer, rate, wanted):
                lines.append(line)
                print(text(line), flush=True)
    finally:
        # What was measured until then is kept, whatever came in between.
        described = describe(device, rates)
        if options.json:
            write_json(options.json, described, lines)
        if options.csv:
            write_csv(options.csv, lines)


if __name__ == "__main__":
    main()
