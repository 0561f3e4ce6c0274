# SPDX-License-Identifier: Apache-2.0
"""Dense and compressed serving side by side: same pool, same prompts, a fresh server each.

Usage: python benchmarks/bench_serving.py --model models/random-llama --out results/serving.json

Cases differ in the pool: `ample` holds all requests without compression, `tight` a few of them.
A configuration is a recipe, by name or file, or `dense`; `+fp8` behind it stores float8, in a pool
of as many bytes. `benchmarks/recipes` holds ways to share a budget in one block table (where layers
have levels, a block is of fewer layers, and as many blocks are fewer bytes: bench_levels.py).
All prompts are sent at once by streaming clients; the pool is watched through `/metrics`, as an
operator would.
"""

import json
import shlex
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from serving.load import random_prompts
from serving.load import run as run_load
from serving.report import DENSE, Run, print_tables, ratios, write
from serving.summary import summarize

from ems_vllm.config.cache_shape import CacheShape
from ems_vllm.eval.records import environment
from ems_vllm.eval.server import block_pool
from ems_vllm.eval.server.process import Server

BLOCK_SIZE = 16
CASES = ("ample", "tight")
_WARM_UP_TOKENS = 8
_FLOAT8 = "+fp8"


@dataclass(frozen=True)
class Settings:
    """What is measured; the same for every configuration but for case and recipe.

    Attributes:
        itemsize: Bytes of a number in the model's own dtype.
        config: Further settings for --kv-compression-config, beside the budget.
        num_tight: Dense requests that the `tight` pool holds.
        interval_s: Between two samples of the pool.
        server_args: Further arguments of `vllm serve`, for dense and compressed alike.
    """

    model: str
    itemsize: int
    num_prompts: int
    prompt_len: int
    num_new_tokens: int
    budget: int
    config: dict[str, Any]
    num_tight: int
    interval_s: float
    seed: int
    server_args: list[str]

    @property
    def max_model_len(self) -> int:
        return self.prompt_len + self.num_new_tokens

    def num_blocks(self, case: str, recipe: str) -> int:
        """Size of the pool for --num-gpu-blocks-override, vLLM's null block included."""
        num_dense = self.num_prompts if case == "ample" else self.num_tight
        num_blocks = num_dense * -(-self.max_model_len // BLOCK_SIZE)
        # The same bytes: one for a number of float8.
        return num_blocks * (self.itemsize if recipe.endswith(_FLOAT8) else 1) + 1

    def arguments(self, case: str, recipe: str) -> list[str]:
        """Arguments of `vllm serve`."""
        arguments = [
            *("--block-size", str(BLOCK_SIZE)),
            *("--max-model-len", str(self.max_model_len)),
            *("--num-gpu-blocks-override", str(self.num_blocks(case, recipe))),
            *self.server_args,
        ]
        if recipe.endswith(_FLOAT8):
            arguments += ["--kv-cache-dtype", "fp8"]
        recipe = recipe.removesuffix(_FLOAT8)
        if recipe != DENSE:
            config = {"budget": self.budget, **self.config}
            arguments += ["--kv-compression", recipe]
            arguments += ["--kv-compression-config", json.dumps(config)]
        return arguments


def measure(settings: Settings, case: str, recipe: str, vocab_size: int) -> Run:
    """Start a server, warm it up, load it, sum up."""
    prompts = random_prompts(settings.num_prompts, settings.prompt_len, vocab_size, settings.seed)
    warm_up = random_prompts(1, settings.prompt_len, vocab_size, settings.seed + 1)
    with tempfile.TemporaryDirectory() as folder:
        arguments = settings.arguments(case, recipe)
        with Server(settings.model, arguments, Path(folder) / "server.log") as server:
            run_load(server.url, server.model, warm_up, _WARM_UP_TOKENS, settings.interval_s)
            before = block_pool.read(server.url).num_preemptions
            load = run_load(
                server.url,
                server.model,
                prompts,
                settings.num_new_tokens,
                settings.interval_s,
            )
    name = Path(recipe).stem if recipe.endswith(".yaml") else recipe
    return Run(case, name, summarize(load, before), load.samples)


def vocab_size(model: str) -> int:
    """Size of the vocabulary, from the model's configuration alone."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(model).get_text_config().vocab_size


def main(
    model: Annotated[str, typer.Option(help="As for `vllm serve`.")] = "models/random-llama",
    num_prompts: Annotated[int, typer.Option(min=1)] = 16,
    prompt_len: Annotated[int, typer.Option(min=1)] = 4000,
    num_new_tokens: Annotated[int, typer.Option(min=2)] = 256,
    budget: Annotated[int, typer.Option(min=1, help="Entries kept per kv_head.")] = 256,
    config: Annotated[str, typer.Option(help="Further compression settings, JSON.")] = "{}",
    recipes: Annotated[
        str,
        typer.Option(help=f"Comma-separated; {DENSE} is vLLM alone, NAME{_FLOAT8} stores float8."),
    ] = f"{DENSE},ems",
    cases: Annotated[str, typer.Option(help="Comma-separated.")] = ",".join(CASES),
    num_tight: Annotated[
        int, typer.Option(min=1, help="Dense requests that the tight pool holds.")
    ] = 4,
    interval_s: Annotated[float, typer.Option(help="Between two samples of the pool.")] = 0.5,
    seed: int = 0,
    server_args: Annotated[str, typer.Option(help="Further arguments of `vllm serve`.")] = "",
    quick: Annotated[bool, typer.Option(help="Small sizes, to see that it runs.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write the report here, JSON.")] = None,
) -> None:
    """Measure blocks, throughput and latency of dense and compressed serving."""
    settings = Settings(
        model=model,
        itemsize=CacheShape.read(Path(model)).itemsize,
        num_prompts=num_prompts,
        prompt_len=prompt_len,
        num_new_tokens=num_new_tokens,
        budget=budget,
        config=json.loads(config),
        num_tight=num_tight,
        interval_s=interval_s,
        seed=seed,
        server_args=shlex.split(server_args),
    )
    if quick:
        settings = replace(
            settings,
            num_prompts=4,
            prompt_len=768,
            num_new_tokens=48,
            budget=64,
            num_tight=2,
            interval_s=0.05,
        )
    for case in cases.split(","):
        if case not in CASES:
            raise typer.BadParameter(f"{case!r} is not a case: use {' or '.join(CASES)}.")
    console = Console()
    # Now, because a checkout may change while this runs.
    described = environment.describe()
    size = vocab_size(model)
    runs = []
    for case in cases.split(","):
        for recipe in recipes.split(","):
            console.print(f"{case}, {recipe} ...")
            runs.append(measure(settings, case, recipe, size))
    print_tables(console, runs)
    if out is not None:
        report = {
            "command": shlex.join(["python", *sys.argv]),
            "environment": described,
            "settings": asdict(settings),
            "runs": [run.to_dict() for run in runs],
            "ratios": ratios(runs),
        }
        write(out, report)
        console.print(f"written to {out}")


if __name__ == "__main__":
    typer.run(main)
