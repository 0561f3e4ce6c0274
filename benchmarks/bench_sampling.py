# SPDX-License-Identifier: Apache-2.0
"""What `sample_stride` costs in ranking and saves in time, on the queries and keys of a real model.

Usage: ems-vllm eval MODEL --preset tiny --tasks niah --lengths 4096 --export-prompts prompts.jsonl
       python benchmarks/bench_sampling.py --model MODEL --prompts prompts.jsonl \\
           --out benchmarks/results/sampling-cpu.json

For every layer and kv_head, the accumulated score of each entry from a part of the prompt's queries
is compared with the one from all of them: rank correlation, and the share of the best entries that
are among the best of the sample.
"""

import statistics
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from serving.report import write

from ems_vllm import ops
from ems_vllm.eval.records import environment
from ems_vllm.eval.records.prompt_files import read_prompts
from ems_vllm.eval.transformers_engine.attention import observed_by
from ems_vllm.eval.transformers_engine.engine import TransformersEngine
from ems_vllm.eval.transformers_engine.paging import from_pages, to_pages

BLOCK_SIZE = 16


@dataclass(frozen=True)
class Layer:
    """What one attention layer saw of a prompt.

    Attributes:
        query: [num_tokens, num_heads, head_size] - after RoPE.
        key: [num_kv_heads, num_tokens, head_size] - after RoPE.
    """

    query: torch.Tensor
    key: torch.Tensor


@dataclass
class Comparison:
    """One stride against all queries; means over prompts, layers and kv_heads.

    Attributes:
        rank_correlation: Spearman's.
        kept: Share of the best entries that the sample finds, by budget (fraction of the prompt).
        seconds: Median time of a layer.
        time_ratio: `seconds` over that of stride 1.
    """

    stride: int
    rank_correlation: float
    kept: dict[float, float]
    seconds: float
    time_ratio: float


def observe(engine: TransformersEngine, token_ids: Sequence[int]) -> list[Layer]:
    """Queries and keys of every layer that is compressed."""
    layers: dict[int, Layer] = {}

    def keep(index: int, query: torch.Tensor, key: torch.Tensor) -> None:
        layers[index] = Layer(query.contiguous(), key.contiguous())

    with torch.inference_mode(), observed_by(keep):
        engine.model(torch.tensor([token_ids], device=engine.model.device))
    return [layers[index] for index in engine.compressed_layers]


def score(layer: Layer, scale: float, stride: int) -> tuple[torch.Tensor, float]:
    """Accumulated scores, [num_kv_heads, num_tokens], and the time they took."""
    num_tokens = layer.query.shape[0]
    pages = to_pages(layer.key[None], BLOCK_SIZE)[0]
    device = pages.device
    table = torch.arange(len(pages), dtype=torch.int32, device=device)[None]
    scores = torch.zeros(pages.shape[:3], device=device)

    def number(value: int) -> torch.Tensor:
        return torch.tensor([value], dtype=torch.int32, device=device)

    start = _now(device)
    ops.score_queries(
        layer.query,
        pages,
        table,
        number(0),
        number(num_tokens),
        number(num_tokens),
        number(0),
        table,
        None,
        scale,
        stride,
        scores,
    )
    seconds = _now(device) - start
    return from_pages(scores[None], 0, num_tokens)[0], seconds


def compare(
    layers: Iterator[Layer], scale: float, strides: Sequence[int], budgets: Sequence[float]
) -> list[Comparison]:
    """All strides over all layers; the first stride is 1."""
    correlations: dict[int, list[float]] = defaultdict(list)
    kept: dict[tuple[int, float], list[float]] = defaultdict(list)
    times: dict[int, list[float]] = defaultdict(list)
    for layer in layers:
        exact, _ = score(layer, scale, 1)
        for stride in strides:
            sampled, seconds = score(layer, scale, stride)
            times[stride].append(seconds)
            correlations[stride] += rank_correlation(exact, sampled).tolist()
            for budget in budgets:
                kept[stride, budget] += overlap(exact, sampled, budget).tolist()
    exact_time = statistics.median(times[1])
    return [
        Comparison(
            stride,
            statistics.fmean(correlations[stride]),
            {budget: statistics.fmean(kept[stride, budget]) for budget in budgets},
            statistics.median(times[stride]),
            statistics.median(times[stride]) / exact_time,
        )
        for stride in strides
    ]


def rank_correlation(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Spearman's coefficient of each row, [num_rows]."""
    ranks = torch.stack([first, second]).argsort(-1).argsort(-1).double()
    ranks -= ranks.mean(-1, keepdim=True)
    return (ranks[0] * ranks[1]).sum(-1) / ranks.square().sum(-1).prod(0).sqrt()


def overlap(first: torch.Tensor, second: torch.Tensor, budget: float) -> torch.Tensor:
    """Share of each row's best entries that are also the best of the other, [num_rows]."""
    count = max(1, round(budget * first.shape[-1]))
    chosen = torch.zeros(2, *first.shape, dtype=torch.bool, device=first.device)
    for mask, scores in zip(chosen, (first, second), strict=True):
        mask.scatter_(-1, scores.topk(count).indices, True)
    return chosen.all(0).sum(-1) / count


def show(found: Sequence[Comparison], console: Console) -> None:
    table = Table(title="sampled against all queries")
    budgets = list(found[0].kept)
    for name in ("stride", "rank correlation", *(f"kept at {b:.1%}" for b in budgets), "time"):
        table.add_column(name, justify="right")
    for row in found:
        kept = [f"{row.kept[budget]:.3f}" for budget in budgets]
        table.add_row(
            str(row.stride), f"{row.rank_correlation:.3f}", *kept, f"{row.time_ratio:.2f}"
        )
    console.print(table)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def main(
    model: Annotated[str, typer.Option(help="Model folder.")],
    prompts: Annotated[Path, typer.Option(help="What `eval --export-prompts` wrote.")],
    out: Annotated[Path | None, typer.Option(help="JSON file for the results.")] = None,
    stride: Annotated[list[int] | None, typer.Option(help="2 to 16.")] = None,
    budget: Annotated[list[float] | None, typer.Option(help="Fractions of the prompt.")] = None,
) -> None:
    """What `sample_stride` costs in ranking and saves in time."""
    engine = TransformersEngine.load(model)
    asked = read_prompts(prompts)
    layers = (
        layer
        for prompt in track(asked, "prompts")
        for layer in observe(engine, prompt.prompt_token_ids)
    )
    strides = [1, *(stride or (2, 4, 8, 16))]
    found = compare(layers, engine.scale, strides, budget or (0.02, 0.06, 0.125))
    show(found, Console())
    if out is not None:
        result: dict[str, Any] = {
            "environment": environment.describe(),
            "model": model,
            "num_prompts": len(asked),
            "prompt_tokens": [len(prompt.prompt_token_ids) for prompt in asked],
            "strides": [asdict(row) for row in found],
        }
        write(out, result)


if __name__ == "__main__":
    typer.run(main)
