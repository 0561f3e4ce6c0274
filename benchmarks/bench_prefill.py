# SPDX-License-Identifier: Apache-2.0
"""What scoring adds to the prefill: time to first token, dense and EMS, in vLLM and transformers.

Usage: OMP_NUM_THREADS=1 python benchmarks/bench_prefill.py --model MODEL \\
           --out benchmarks/results/prefill-cpu.json

One request at a time, without prefix cache. Every engine runs in a process of its own and they take
turns with the same prompts, so whatever else the machine does, hits all of them. CPU seconds count
only what an engine computes; on a machine that is shared they are the ones to compare. Where even
those differ more from prompt to prompt than compression adds, what vLLM spends in scoring and
compacting is counted within the compressed engine's own run.
"""

import multiprocessing
import os
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from serving.load import random_prompts
from serving.report import write

from ems_vllm.eval.records import environment


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
        chunk: Tokens that vLLM processes in a step at most.
        async_scheduling: Whether vLLM begins the next step before it hands out a step's tokens.
        budget: Entries kept per kv_head.
    """

    model: str
    dtype: str
    prompt_len: int
    chunk: int
    async_scheduling: bool
    budget: int
    repeats: int
    seed: int


@dataclass(frozen=True)
class Engine:
    """One way to process a prompt.

    Attributes:
        base: Name of the engine that it is compared with.
        build: Name of the function that starts it.
        global_queries: Queries that score; None for an engine without compression.
    """

    name: str
    base: str
    build: str
    global_queries: int | str | None = None


@dataclass(frozen=True)
class Time:
    """Of one prompt.

    Attributes:
        first: Seconds until the first token. Where vLLM schedules ahead, on the CPU it computes the
            next step, with the compaction, before it hands out the first token.
        second: Seconds from there to the second, which is there already then.
        first_cpu, second_cpu: The same in CPU seconds.
        added_cpu: Of both, CPU seconds in vLLM's calls of what compression adds to attention and
            between steps; 0 in transformers, where they are not counted.
    """

    first: float
    second: float
    first_cpu: float
    second_cpu: float
    added_cpu: float


ENGINES = (
    Engine("vllm", "vllm", "start_vllm"),
    Engine("vllm ems 256", "vllm", "start_vllm", 256),
    Engine("vllm ems all", "vllm", "start_vllm", "all"),
    Engine("transformers", "transformers", "start_transformers"),
    Engine("transformers ems 256", "transformers", "start_evaluation", 256),
    Engine("transformers ems all", "transformers", "start_evaluation", "all"),
)

Steps = Callable[[list[int]], Sequence[Callable[[], object]]]
"""From a prompt to two functions: the first ends with the first token, the other with the next."""


def start_vllm(settings: Settings, global_queries: int | str | None) -> Steps:
    """vLLM with or without compression, in this process."""
    from vllm import LLM, SamplingParams

    length = settings.prompt_len + 16
    more: dict[str, Any] = {}
    if global_queries is not None:
        config = {"recipe": "ems", "budget": settings.budget, "global_queries": global_queries}
        more["additional_config"] = {"kv_compression": config}
    engine = LLM(
        settings.model,
        dtype=settings.dtype,
        max_model_len=length,
        max_num_batched_tokens=settings.chunk,
        max_num_seqs=1,
        async_scheduling=settings.async_scheduling,
        num_gpu_blocks_override=2 * -(-length // 16),
        enable_prefix_caching=False,
        **more,
    ).llm_engine
    params = SamplingParams(max_tokens=2, temperature=0, ignore_eos=True)

    def steps(prompt: list[int]) -> Sequence[Callable[[], object]]:
        def until(num_tokens: int) -> None:
            done = 0
            while done < num_tokens:
                for output in engine.step():
                    done = len(output.outputs[0].token_ids)

        def first() -> None:
            engine.add_request(str(id(prompt)), {"prompt_token_ids": prompt}, params)
            until(1)

        return first, lambda: until(2)

    return steps


def start_transformers(settings: Settings, global_queries: int | str | None) -> Steps:
    """transformers with torch's attention, the whole prompt at once."""
    import torch
    from transformers import AutoModelForCausalLM, DynamicCache

    model: Any = AutoModelForCausalLM.from_pretrained(
        settings.model, dtype=getattr(torch, settings.dtype), attn_implementation="sdpa"
    ).eval()

    def steps(prompt: list[int]) -> Sequence[Callable[[], object]]:
        cache = DynamicCache(config=model.config)
        inputs = [prompt]

        @torch.inference_mode()
        def step() -> None:
            logits = model(torch.tensor(inputs), past_key_values=cache, logits_to_keep=1).logits
            inputs[:] = [[int(logits[0, -1].argmax())]]

        return step, step

    return steps


def start_evaluation(settings: Settings, global_queries: int | str | None) -> Steps:
    """The evaluation's engine on transformers."""
    from ems_vllm.config import RequestOptions, load_config
    from ems_vllm.eval.transformers_engine.answer import generated
    from ems_vllm.eval.transformers_engine.engine import TransformersEngine

    model = TransformersEngine.load(settings.model, "cpu", settings.dtype)
    config = load_config(
        {"recipe": "ems", "budget": settings.budget, "global_queries": global_queries}
    )
    assert config is not None
    options = RequestOptions()

    def steps(prompt: list[int]) -> Sequence[Callable[[], object]]:
        def tokens() -> Any:
            scored = model.scored_queries(len(prompt), config, options)
            assert scored is not None, "the prompt is too short to be compressed"
            prefilled = model.prefill(prompt, config.obs_window, [scored])
            request = model.request(prefilled, config, options)
            yield from generated(prefilled.logits, request.step)

        answer = tokens()
        return (lambda: next(answer)), (lambda: next(answer))

    return steps


class AddedTime:
    """CPU seconds spent where compression hooks into vLLM's workers, in this process."""

    def __init__(self) -> None:
        from ems_vllm.engine.attention.bindings import QueryObserver
        from ems_vllm.engine.group.compressed_group import CompressedGroup

        self.seconds = 0.0
        self._wrap(QueryObserver, "observe")
        self._wrap(CompressedGroup, "compact")

    def _wrap(self, owner: type, name: str) -> None:
        call = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.process_time()
            try:
                return call(*args, **kwargs)
            finally:
                self.seconds += time.process_time() - start

        setattr(owner, name, timed)


def serve(connection: Connection, settings: Settings, engine: Engine) -> None:
    """Process prompts as they come, in a process of its own."""
    added = AddedTime()
    steps = globals()[engine.build](settings, engine.global_queries)
    connection.send(None)
    while (prompt := connection.recv()) is not None:
        added.seconds = 0.0
        times = [(time.perf_counter(), time.process_time())]
        for step in steps(prompt):
            step()
            times.append((time.perf_counter(), time.process_time()))
        (start, start_cpu), (first, first_cpu), (second, second_cpu) = times
        connection.send(
            Time(
                first=first - start,
                second=second - first,
                first_cpu=first_cpu - start_cpu,
                second_cpu=second_cpu - first_cpu,
                added_cpu=added.seconds,
            )
        )


class Child:
    """An engine that runs in another process."""

    def __init__(self, settings: Settings, engine: Engine) -> None:
        # Safe with one OpenMP thread only, and then it saves importing vLLM again.
        method = "fork" if os.environ.get("OMP_NUM_THREADS") == "1" else "spawn"
        context = multiprocessing.get_context(method)
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, settings, engine), daemon=True)
        self._process.start()
        theirs.close()
        self._connection.recv()

    def process(self, prompt: list[int]) -> Time:
        self._connection.send(prompt)
        return self._connection.recv()

    def __enter__(self) -> "Child":
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.send(None)
        self._process.join()


def measure(
    settings: Settings, engines: Sequence[Engine], size: int
) -> Iterator[dict[str, list[Time]]]:
    """Times of every engine so far, after each prompt; the beginning of another warms up."""
    warm_up, *prompts = random_prompts(
        settings.repeats + 1, settings.prompt_len, size, settings.seed
    )
    times: dict[str, list[Time]] = {engine.name: [] for engine in engines}
    with ExitStack() as stack:
        children = {engine.name: stack.enter_context(Child(settings, engine)) for engine in engines}
        for child in children.values():
            child.process(warm_up[:512])
        order = list(children)
        for prompt in track(prompts, "prompts"):
            for name in order:
                times[name].append(children[name].process(prompt))
            # A machine that slows down or speeds up favours no place in the order.
            order.reverse()
            yield times


def summarize(engine: Engine, times: dict[str, list[Time]]) -> dict[str, Any]:
    """Medians, and the medians of the ratios to the base, prompt by prompt.

    `added_ratio` is what compression adds to the rest of its own run.
    """
    mine, base = times[engine.name], times[engine.base]
    fields = [*asdict(mine[0])]
    ratios = {
        f"{field}_ratio": statistics.median(
            getattr(a, field) / getattr(b, field) for a, b in zip(mine, base, strict=True)
        )
        for field in ("first", "first_cpu")
    }
    ratios["added_ratio"] = statistics.median(
        t.added_cpu / (t.first_cpu + t.second_cpu - t.added_cpu) for t in mine
    )
    medians = {f: statistics.median(getattr(t, f) for t in mine) for f in fields}
    rounded = {name: round(value, 3) for name, value in {**medians, **ratios}.items()}
    every = [round(t.first_cpu, 3) for t in mine]
    return {"engine": engine.name, "base": engine.base, **rounded, "every_first_cpu": every}


def show(rows: Sequence[dict[str, Any]], settings: Settings, console: Console) -> None:
    table = Table(title=f"{settings.prompt_len:,} prompt tokens, {settings.dtype}, seconds")
    columns = {
        "engine": "engine", "first": "first token", "first_ratio": "/ base",
        "first_cpu": "CPU", "first_cpu_ratio": "/ base", "second_cpu": "second token, CPU",
        "added_cpu": "added", "added_ratio": "/ rest",
    }  # fmt: skip
    for label in columns.values():
        table.add_column(label, justify="right")
    for row in rows:
        table.add_row(*(str(row[name]) for name in columns))
    console.print(table)


def main(
    model: Annotated[str, typer.Option(help="Model folder.")],
    dtype: Annotated[str, typer.Option(help="Of the model.")] = "bfloat16",
    prompt_len: Annotated[int, typer.Option(min=512)] = 3000,
    chunk: Annotated[int, typer.Option(min=16, help="max_num_batched_tokens of vLLM.")] = 2048,
    async_scheduling: Annotated[bool, typer.Option(help="Of vLLM, as its flag.")] = True,
    budget: Annotated[int, typer.Option(min=16, help="Entries kept per kv_head.")] = 256,
    repeats: Annotated[int, typer.Option(min=1, help="Prompts that count.")] = 5,
    only: Annotated[str, typer.Option(help="Engines, by commas; all by default.")] = "",
    seed: int = 0,
    out: Annotated[Path | None, typer.Option(help="Write the report here, JSON.")] = None,
) -> None:
    """Measure what scoring adds to the prefill."""
    # vLLM too, for children that are forks.
    import vllm  # noqa: F401
    from transformers import AutoConfig

    # For the children; vLLM computes in the process that is timed.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    names = only.split(",") if only else [engine.name for engine in ENGINES]
    engines = [engine for engine in ENGINES if engine.name in names]
    settings = Settings(model, dtype, prompt_len, chunk, async_scheduling, budget, repeats, seed)
    # Now, because a checkout may change while this runs.
    described = {**environment.describe(), "transformers": version("transformers")}
    size = AutoConfig.from_pretrained(model).get_text_config().vocab_size
    command = shlex.join(["python", *sys.argv]).replace(model, Path(model).name)
    rows: list[dict[str, Any]] = []
    # Written after every prompt: a run that is cut off leaves what it has.
    for times in measure(settings, engines, size):
        rows = [summarize(engine, times) for engine in engines if engine.base in times]
        if out is not None:
            report = {
                "command": command,
                "environment": described,
                "threads": os.environ.get("OMP_NUM_THREADS"),
                "settings": {**asdict(settings), "model": Path(model).name},
                "engines": rows,
            }
            write(out, report)
    show(rows, settings, Console())


if __name__ == "__main__":
    typer.run(main)
