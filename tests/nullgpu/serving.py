# SPDX-License-Identifier: Apache-2.0
"""Serves with vLLM on the null GPU in a process of its own, and tells what the GPU was asked to do.

A case is what one process does: engines one after the other. Engines cost about a minute each, so
tests share them (`served`).
"""

from __future__ import annotations

import functools
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from nullgpu.trace import Event, listening, take
from processes import run_script

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / "build" / "nullgpu" / "cache"
COMPRESSION = {
    "recipe": "ems",
    "budget": 64,
    "recent_window": 32,
    "recompress_interval": 16,
    "min_blocks_saved": 1,
}
# Two that are compressed, the second in three chunks, and one that is not.
REQUESTS = ((300, 40), (600, 40), (10, 40))
CHUNK = 256

_SCRIPT = """
if __name__ == "__main__":
    import json, sys
    from nullgpu import serving
    print(json.dumps(serving.run_case(json.loads(sys.argv[1]))))
"""


@dataclass(frozen=True)
class Run:
    """An engine and what it is asked.

    Attributes:
        compression: As `additional_config["kv_compression"]`; None is vLLM alone.
        arguments: More arguments of vLLM's LLM.
        requests: (prompt length, new tokens) of requests that are sent together.
        sleeps: Whether the engine serves them once before, sleeps and wakes up.
        extra_args: Of each request.
    """

    compression: dict[str, Any] | None = field(default_factory=lambda: dict(COMPRESSION))
    arguments: dict[str, Any] = field(default_factory=dict)
    requests: Sequence[tuple[int, int]] = REQUESTS
    sleeps: bool = False
    extra_args: dict[str, Any] | None = None


@dataclass(frozen=True)
class Step:
    """One call of the worker.

    Attributes:
        spans: (tokens processed before, and after, prompt length) of each request.
        num_compactions: Requests that were compacted before the model ran.
        events: What the GPU was asked to do, counted.
    """

    spans: list[list[int]]
    num_compactions: int
    events: Counter[Event]

    @property
    def num_prompt(self) -> int:
        """Prompt tokens that were processed."""
        return sum(len(range(start, min(stop, length))) for start, stop, length in self.spans)

    @property
    def only_decodes(self) -> bool:
        return self.num_prompt == 0 and self.num_compactions == 0

    def count(self, **wanted: Any) -> int:
        """Events whose fields have these values."""
        return count(self.events, **wanted)


@dataclass(frozen=True)
class Served:
    """What a Run led to.

    Attributes:
        start: Events until the engine was ready, captures of graphs included.
        steps: Real steps, in order.
        answer_lens: Tokens of each answer.
        stats: The compressed group's counters, if there is one.
        num_used_blocks: Blocks in use when all requests had ended.
        runner, backend, graphs: What vLLM chose.
        freed_bytes: What sleeping gave back of the GPU's memory, and what of it waking up took.
    """

    start: Counter[Event]
    steps: list[Step]
    answer_lens: list[int]
    stats: dict[str, int]
    num_used_blocks: int
    runner: str
    backend: str
    graphs: str
    freed_bytes: list[int]


def count(events: Counter[Event], **wanted: Any) -> int:
    """How many events have fields or properties of these values."""
    return sum(
        number
        for event, number in events.items()
        if all(getattr(event, name) == value for name, value in wanted.items())
    )


@functools.cache
def served(runner: int, *runs: str) -> list[Served]:
    """What runs led to, in one process; each as `text_of` writes it, so that it can be a key."""
    case = {"runner": runner, "runs": [json.loads(run) for run in runs]}
    return [_read(found) for found in run_script(_SCRIPT, case, environment(runner))]


def environment(runner: int) -> dict[str, str]:
    """Of a process that serves with a model runner, 1 or 2; what it compiles is kept."""
    return os.environ | {
        "VLLM_USE_V2_MODEL_RUNNER": str(runner - 1),
        "VLLM_USE_FLASHINFER_SAMPLER": "0",
        "VLLM_CACHE_ROOT": str(CACHE / "vllm"),
        "TRITON_CACHE_DIR": str(CACHE / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(CACHE / "inductor"),
    }


def text_of(run: Run) -> str:
    return json.dumps(asdict(run), sort_keys=True)


def serve(runner: int, *runs: Run) -> list[Served]:
    """What runs led to; asked for again, it is not done again.

    Args:
        runner: 1 or 2, of vLLM's model runners.
        runs: Engines for one process, one after the other.
    """
    return served(runner, *map(text_of, runs))


# -- in the other process --------------------------------------------------------------------------


def run_case(case: dict[str, Any]) -> list[dict[str, Any]]:
    from nullgpu import stand_in

    if case["runner"] == 2:
        stand_in.install()
    return [_serve(Run(**run)) for run in case["runs"]]


def _serve(run: Run) -> dict[str, Any]:
    from engine.harness import LLAMA, engine, tokens

    arguments = {
        "model": LLAMA,
        "dtype": "bfloat16",
        "max_model_len": 1024,
        "max_num_batched_tokens": CHUNK,
        "max_num_seqs": 8,
        "num_blocks": 200,
        "skip_tokenizer_init": True,
        "enable_sleep_mode": run.sleeps,
    }
    with listening() as start:
        context = engine(run.compression, **arguments | run.arguments)
        probe = context.__enter__()
    try:
        prompts = [tokens(length, seed=i) for i, (length, _) in enumerate(run.requests)]
        nums_new = [num_new for _, num_new in run.requests]
        freed: list[int] = []
        if run.sleeps:
            probe.generate(prompts, nums_new, detokenize=False)
            freed = _sleep_and_wake(probe)
        steps: list[dict[str, Any]] = []
        with _steps_noted(probe, steps):
            answers = probe.generate(prompts, nums_new, run.extra_args, detokenize=False)
        worker_runner = probe.worker.model_runner
        return {
            "start": _written(start),
            "steps": steps,
            "answer_lens": [len(answer) for answer in answers],
            "stats": probe.stats() if run.compression else {},
            "num_used_blocks": probe.pool.num_gpu_blocks - 1 - probe.pool.get_num_free_blocks(),
            "runner": type(worker_runner).__module__,
            "backend": worker_runner.attn_groups[0][0].backend.__name__,
            "graphs": worker_runner.vllm_config.compilation_config.cudagraph_mode.name,
            "freed_bytes": freed,
        }
    finally:
        context.__exit__(None, None, None)


def _sleep_and_wake(probe: Any) -> list[int]:
    import gc

    import torch

    # What earlier requests left in torch's cache goes with sleeping, and does not come back.
    gc.collect()
    torch.cuda.empty_cache()

    def free() -> int:
        return torch.cuda.mem_get_info()[0]

    awake = free()
    probe.llm.sleep(level=1)
    asleep = free()
    probe.llm.wake_up()
    return [asleep - awake, asleep - free()]


@contextmanager
def _steps_noted(probe: Any, steps: list[dict[str, Any]]) -> Iterator[None]:
    """Everything from one call of the worker to the next belongs to the first."""
    execute = probe.worker.execute_model
    compression = getattr(probe.worker, "compression", None)

    def num_compactions() -> int:
        return sum(group.counters.num_compactions for group in compression.groups)

    def noted(output: Any) -> Any:
        if steps:
            steps[-1]["events"] += take()
        before = num_compactions() if compression else 0
        spans = [
            [_start_of(output, req_id), probe.scheduler.requests[req_id].num_prompt_tokens, num]
            for req_id, num in output.num_scheduled_tokens.items()
        ]
        result = execute(output)
        if output.total_num_scheduled_tokens:
            steps.append(
                {
                    "spans": [[start, start + num, length] for start, length, num in spans],
                    "num_compactions": num_compactions() - before if compression else 0,
                    "events": [],
                }
            )
        return result

    probe.worker.execute_model = noted
    with listening() as last:
        yield
    steps[-1]["events"] += last
    for step in steps:
        step["events"] = _written(step["events"])


def _start_of(output: Any, req_id: str) -> int:
    """Tokens of a request that were processed before this step."""
    for request in output.scheduled_new_reqs:
        if request.req_id == req_id:
            return request.num_computed_tokens
    cached = output.scheduled_cached_reqs
    return cached.num_computed_tokens[cached.req_ids.index(req_id)]


def _written(events: Iterable[Event]) -> list[list[Any]]:
    return [[*asdict(event).values(), number] for event, number in Counter(events).items()]


def _read(found: dict[str, Any]) -> Served:
    def events(written: list[list[Any]]) -> Counter[Event]:
        return Counter({Event(*fields): number for *fields, number in written})

    steps = [Step(**{**step, "events": events(step["events"])}) for step in found["steps"]]
    return Served(**{**found, "start": events(found["start"]), "steps": steps})
