# SPDX-License-Identifier: Apache-2.0
"""What a prefix-cache hit changes: the same prompts with and without one, recipe by recipe.

Usage: python benchmarks/bench_prefix_hits.py --out benchmarks/results/prefix-hits-cpu.json

The queries of a hit are not computed again, so they do not score. Recipes that need no queries, or
only the last ones, must not change at all. Prompts are random tokens behind a common prefix and
run one at a time, first with the prefix in the cache, then with an empty cache.
"""

import gc
import json
import os
import shlex
import statistics
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import typer
from rich.console import Console
from rich.table import Table
from serving.load import random_prompts
from serving.report import write

from ems_vllm.eval.records import environment
from ems_vllm.policies import selection

# The selection is read in this process, where the engine must run, too.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

BLOCK_SIZE = 16


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
        tail_len: Tokens behind the common prefix; all of them are computed.
        budget: Entries kept per kv_head.
        config: Further compression settings.
    """

    model: str
    num_prompts: int
    prefix_len: int
    tail_len: int
    num_new_tokens: int
    budget: int
    config: dict[str, Any]
    seed: int


@dataclass(frozen=True)
class Answer:
    """One prompt's answer, and which entries its first compaction kept, by layer and kv_head."""

    tokens: list[int]
    num_cached: int
    kept: list[frozenset[int]]


@dataclass(frozen=True)
class Row:
    """What differs between answers with and without a hit.

    Attributes:
        cached_tokens: Mean length of a hit.
        answers_differ, tokens_differ: Fractions.
        same_tokens: Mean number of tokens before the first one that differs.
        overlap_mean, overlap_min: Jaccard index of the kept entries; mean over prompts, layers and
            kv_heads, and the smallest of any of them.
    """

    recipe: str
    cached_tokens: float
    answers_differ: float
    tokens_differ: float
    same_tokens: float
    overlap_mean: float
    overlap_min: float


class Engine:
    """vLLM with one recipe; tells what a compaction kept."""

    def __init__(self, llm: Any, num_new_tokens: int) -> None:
        self._llm = llm
        self._num_new_tokens = num_new_tokens
        worker = llm.llm_engine.model_executor.driver_worker.worker
        (group,) = worker.compression.groups
        self._num_layers = group.tensors.num_layers

    def reset(self) -> None:
        assert self._llm.reset_prefix_cache()

    def answer(self, prompt: list[int]) -> Answer:
        from vllm import SamplingParams

        params = SamplingParams(max_tokens=self._num_new_tokens, temperature=0, ignore_eos=True)
        selections: list[Any] = []
        select = selection.select

        def observed(*args: Any) -> Any:
            selected = select(*args)
            selections.append(selected.kept_idx[:, 0].tolist())
            return selected

        with mock.patch.object(selection, "select", observed):
            (output,) = self._llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
        # One call may cover a part of the layers; later calls are compactions while decoding.
        layers = [layer for of_call in selections for layer in of_call][: self._num_layers]
        kept = [frozenset(head) - {-1} for layer in layers for head in layer]
        return Answer(list(output.outputs[0].token_ids), output.num_cached_tokens, kept)


@contextmanager
def running(settings: Settings, recipe: str) -> Iterator[Engine]:
    """An engine in this process."""
    from vllm import LLM
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    length = settings.prefix_len + settings.tail_len + settings.num_new_tokens
    config = {"recipe": recipe, "budget": settings.budget, **settings.config}
    llm = LLM(
        settings.model,
        max_model_len=length,
        max_num_seqs=1,
        block_size=BLOCK_SIZE,
        num_gpu_blocks_override=4 * -(-length // BLOCK_SIZE),
        enable_prefix_caching=True,
        additional_config={"kv_compression": config},
    )
    try:
        yield Engine(llm, settings.num_new_tokens)
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def measure(settings: Settings, recipe: str, vocab_size: int) -> Row:
    """Answers to the same prompts with and without a hit."""
    (prefix,) = random_prompts(1, settings.prefix_len, vocab_size, settings.seed)
    tails = random_prompts(
        settings.num_prompts + 1, settings.tail_len, vocab_size, settings.seed + 1
    )
    first, *prompts = [prefix + tail for tail in tails]
    with running(settings, recipe) as engine:
        # Fills the cache.
        engine.answer(first)
        hits = [engine.answer(prompt) for prompt in prompts]
        misses = []
        for prompt in prompts:
            engine.reset()
            misses.append(engine.answer(prompt))
    assert all(answer.num_cached for answer in hits), "there was no hit"
    assert not any(answer.num_cached for answer in misses)
    return compare(recipe, hits, misses)


def compare(recipe: str, hits: Sequence[Answer], misses: Sequence[Answer]) -> Row:
    pairs = list(zip(hits, misses, strict=True))
    tokens = [[a == b for a, b in zip(hit.tokens, miss.tokens, strict=True)] for hit, miss in pairs]
    overlaps = [
        len(a & b) / len(a | b)
        for hit, miss in pairs
        for a, b in zip(hit.kept, miss.kept, strict=True)
    ]
    return Row(
        recipe=recipe,
        cached_tokens=statistics.mean(hit.num_cached for hit in hits),
        answers_differ=statistics.mean(not all(same) for same in tokens),
        tokens_differ=statistics.mean(not same for answer in tokens for same in answer),
        same_tokens=statistics.mean([*same, False].index(False) for same in tokens),
        overlap_mean=statistics.mean(overlaps),
        overlap_min=min(overlaps),
    )


def print_table(console: Console, settings: Settings, rows: Sequence[Row]) -> None:
    table = Table(
        title=f"{settings.num_prompts} prompts of {settings.prefix_len} + {settings.tail_len} "
        f"tokens, {settings.num_new_tokens} new ones, budget {settings.budget}"
    )
    table.add_column("recipe")
    labels = ("tokens hit", "answers differ", "tokens differ", "tokens before", "overlap", "least")
    for label in labels:
        table.add_column(label, justify="right")
    for row in rows:
        table.add_row(
            row.recipe,
            f"{row.cached_tokens:.0f}",
            f"{row.answers_differ:.0%}",
            f"{row.tokens_differ:.1%}",
            f"{row.same_tokens:.1f}",
            f"{row.overlap_mean:.3f}",
            f"{row.overlap_min:.3f}",
        )
    console.print(table)


def main(
    model: Annotated[str, typer.Option(help="As for `vllm serve`.")] = "models/random-llama",
    num_prompts: Annotated[int, typer.Option(min=1)] = 20,
    prefix_len: Annotated[int, typer.Option(min=1)] = 2000,
    tail_len: Annotated[int, typer.Option(min=1)] = 400,
    num_new_tokens: Annotated[int, typer.Option(min=2)] = 32,
    budget: Annotated[int, typer.Option(min=1, help="Entries kept per kv_head.")] = 256,
    config: Annotated[str, typer.Option(help="Further compression settings, JSON.")] = "{}",
    recipes: Annotated[str, typer.Option(help="Comma-separated.")] = "ems,h2o,snapkv,knorm",
    seed: int = 0,
    out: Annotated[Path | None, typer.Option(help="Write the report here, JSON.")] = None,
) -> None:
    """Measure what prefix-cache hits change in answers and in the entries that are kept."""
    from transformers import AutoConfig

    settings = Settings(
        model=model,
        num_prompts=num_prompts,
        prefix_len=prefix_len,
        tail_len=tail_len,
        num_new_tokens=num_new_tokens,
        budget=budget,
        config=json.loads(config),
        seed=seed,
    )
    # Now, because a checkout may change while this runs.
    described = environment.describe()
    size = AutoConfig.from_pretrained(model).get_text_config().vocab_size
    rows = [measure(settings, recipe, size) for recipe in recipes.split(",")]
    console = Console()
    print_table(console, settings, rows)
    if out is not None:
        report = {
            "command": shlex.join(["python", *sys.argv]),
            "environment": described,
            "settings": asdict(settings),
            "recipes": [
                {
                    name: round(value, 4) if isinstance(value, float) else value
                    for name, value in asdict(row).items()
                }
                for row in rows
            ],
        }
        write(out, report)
        console.print(f"written to {out}")


if __name__ == "__main__":
    typer.run(main)
