# SPDX-License-Identifier: Apache-2.0
"""How long a compaction takes by each recipe, beside EMS: `python benchmarks/bench_methods.py`.

Layers of one request are compacted as the engine does it, in random caches: all at once, or where
kv_heads keep different amounts one after the other with kv_heads as rows, which here keep the same.
Recipes take turns, so that what else the machine does meets all of them.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from ems_vllm.config import load_config, recipes
from ems_vllm.eval.records.environment import describe
from ems_vllm.policies.context import CompactionContext
from ems_vllm.policies.policy import Policy
from ems_vllm.policies.rotation import Rotation

BLOCK_SIZE = 16
# SmolLM2-135M.
NUM_LAYERS, NUM_KV_HEADS, GROUP, HEAD_SIZE, HIDDEN_SIZE = 30, 3, 3, 64, 576
FOCUS = "ems"


def build_contexts(
    num_entries: int,
    budget: int,
    tail: int,
    obs_window: int,
    by_head: bool,
    dtype: torch.dtype,
    device: str,
) -> list[CompactionContext]:
    """One request of random keys, values, queries and scores, at its prompt's end."""
    build = partial(_build_context, num_entries, budget, tail, obs_window, dtype, device)
    if not by_head:
        return [build(range(NUM_LAYERS), num_rows=1, num_kv_heads=NUM_KV_HEADS)]
    return [build([layer], num_rows=NUM_KV_HEADS, num_kv_heads=1) for layer in range(NUM_LAYERS)]


def _build_context(
    num_entries: int,
    budget: int,
    tail: int,
    obs_window: int,
    dtype: torch.dtype,
    device: str,
    layer_ids: Sequence[int],
    num_rows: int,
    num_kv_heads: int,
) -> CompactionContext:
    generator = torch.Generator(device).manual_seed(layer_ids[0])
    columns = -(-(num_entries + tail) // BLOCK_SIZE)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device)

    def ints(value: int) -> torch.Tensor:
        return torch.full((num_rows,), value, dtype=torch.int32, device=device)

    num_layers, num_heads = len(layer_ids), num_kv_heads * GROUP
    shape = (num_layers, num_rows * columns, num_kv_heads, BLOCK_SIZE)
    table = torch.arange(num_rows * columns, dtype=torch.int32, device=device)
    table = table.view(num_rows, columns)
    angles = torch.outer(
        torch.arange(columns * BLOCK_SIZE + 1024.0, device=device),
        10000.0 ** -torch.linspace(0, 1, HEAD_SIZE // 2, device=device),
    )
    return CompactionContext(
        key_cache=random(*shape, HEAD_SIZE).to(dtype),
        value_cache=random(*shape, HEAD_SIZE).to(dtype),
        block_table=table,
        num_entries=ints(num_entries),
        num_live=ints(num_entries + tail),
        num_scored=ints(num_entries),
        budgets=ints(budget),
        num_protected=ints(4),
        target_columns=ints((num_entries - budget) // BLOCK_SIZE),
        num_represented=ints(0),
        max_entries=num_entries,
        max_budget=budget,
        scale=HEAD_SIZE**-0.5,
        accumulated_pages=random(*shape).abs(),
        score_table=table,
        query_ring=random(num_layers, num_rows, obs_window, num_heads, HEAD_SIZE).to(dtype),
        ring_rows=torch.arange(num_rows, dtype=torch.int32, device=device),
        num_queries=ints(min(tail, obs_window)),
        end_positions=ints(num_entries + tail),
        is_untouched=torch.ones(num_rows, dtype=torch.bool, device=device),
        rotations=[Rotation(torch.cat([angles.cos(), angles.sin()], 1), is_neox=True)] * num_layers,
        layer_ids=layer_ids,
        rows_together=num_rows,
        output_weights=[random(HIDDEN_SIZE, num_heads * HEAD_SIZE).to(dtype)] * num_layers,
    )


def compact(policy: Policy, contexts: Sequence[CompactionContext], budget: int) -> None:
    for context in contexts:
        scores = policy.score(context)
        if policy.allocator.deals_by_scores:
            # What comes out is not used, so that all recipes move as much.
            policy.allocator.deal(context, scores, [budget])
        policy.place(context, scores)


def seconds(run: Callable[[], Any], device: str) -> float:
    """Of one call: of the processor's on a CPU, which other processes do not lengthen much."""
    if device == "cpu":
        start = time.process_time()
        run()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def main(
    length: Annotated[int, typer.Option(help="Entries to choose from.")] = 4096,
    budget: Annotated[int, typer.Option(help="Entries that stay.")] = 1024,
    rounds: int = 5,
    dtype: str = "bfloat16",
    device: str = "cpu",
    out: Path | None = None,
) -> None:
    """Time every recipe."""
    found: dict[str, list[float]] = {}
    with torch.inference_mode():
        for _ in range(rounds + 1):
            for name in recipes.names():
                config = load_config({"recipe": name, "budget": budget})
                assert config is not None
                by_head = config.allocator.deals_to_heads
                contexts = build_contexts(
                    length, budget, 32, config.obs_window, by_head, getattr(torch, dtype), device
                )
                run = partial(compact, Policy.from_config(config), contexts, budget)
                found.setdefault(name, []).append(seconds(run, device))
    # The first round warms up.
    medians = {name: statistics.median(times[1:]) for name, times in found.items()}
    table = Table("recipe", "seconds", "of ems'")
    for name, median in sorted(medians.items(), key=lambda item: item[1]):
        table.add_row(name, f"{median:.3f}", f"{median / medians[FOCUS]:.2f}")
    Console().print(table)
    if out is not None:
        result = {
            "environment": describe(),
            "shape": {
                "num_layers": NUM_LAYERS,
                "num_kv_heads": NUM_KV_HEADS,
                "group": GROUP,
                "head_size": HEAD_SIZE,
                "entries": length,
                "budget": budget,
                "dtype": dtype,
                "device": device,
                "threads": torch.get_num_threads(),
            },
            "seconds": {name: round(median, 4) for name, median in medians.items()},
        }
        out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
