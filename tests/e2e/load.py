# SPDX-License-Identifier: Apache-2.0
"""Loads real servers over HTTP and compares every answer: `make load CLIENTS=200 REQUESTS=2000`.

Each configuration gets a server of its own. It first answers every request alone; then all clients
send them at once, into a pool too small for that, and a fifth of them leave early. Nothing may be
lost: every finished answer is the one the request gets alone, no block and no memory is kept, and
the server answers as before. Ends with an error otherwise.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import psutil
from e2e.clients import wait_until_idle
from e2e.load_clients import (
    MAX_LEN,
    MAX_NEW_TOKENS,
    Answer,
    Case,
    Job,
    answers_alone,
    make_cases,
    make_jobs,
    run,
)
from e2e.load_result import Difference, Expectation, MemorySample, Result, compare, table
from rich.console import Console
from serving.report import write

from ems_vllm.eval.records import environment
from ems_vllm.eval.server.process import Server

ROOT = Path(__file__).resolve().parents[2]
BLOCK_SIZE = 16
BUDGET, RECENT_WINDOW, INTERVAL = 96, 32, 32
_SETTINGS = {"budget": BUDGET, "recent_window": RECENT_WINDOW, "recompress_interval": INTERVAL}
_NUM_AFTERWARDS = 8
_NUM_MEMORY_SAMPLES = 40
# Each client's requests, on average, below which a server is still warming up.
_WARM_UP = 10
_PREFIX_HITS = "vllm:prefix_cache_hits_total{"


@dataclass(frozen=True)
class Configuration:
    """A way to serve.

    Attributes:
        recipe: None: vLLM alone.
        hits_change_answers: All queries of a prompt score that are computed, so answers depend on
            what a hit spares.
    """

    name: str
    recipe: str | None = None
    hits_change_answers: bool = False

    def arguments(self, max_len: int = MAX_LEN) -> list[str]:
        """Arguments of `vllm serve`, with a pool for little more than the longest request."""
        longest = -(-(max_len + MAX_NEW_TOKENS) // BLOCK_SIZE)
        arguments = [
            *("--max-model-len", str(longest * BLOCK_SIZE)),
            *("--num-gpu-blocks-override", str(longest + longest // 16 + 1)),
            *("--dtype", "float32", "--enable-prompt-tokens-details"),
        ]
        if self.recipe is not None:
            settings: dict[str, object] = dict(_SETTINGS)
            if self.hits_change_answers:
                settings["global_queries"] = "all"
            arguments += ["--kv-compression", self.recipe]
            arguments += ["--kv-compression-config", json.dumps(settings)]
        return arguments

    def expectation(self, cases: Sequence[Case]) -> Expectation:
        exact = {i for i, case in enumerate(cases) if _is_never_compressed(case)}
        return Expectation(
            exact_cases=frozenset(exact) if self.hits_change_answers else None,
        )


DENSE = "dense"
CONFIGURATIONS = (
    Configuration(DENSE),
    Configuration("knorm", "knorm"),
    Configuration("ems", "ems"),
    Configuration("ems, all queries score", "ems", hits_change_answers=True),
)


def make_model(folder: Path) -> str:
    """A model for which 6,000 tokens take less than a second, with the tiny models' tokenizer."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    source = ROOT / "models" / "random-llama"
    config = LlamaConfig.from_pretrained(
        source,
        num_hidden_layers=2,
        hidden_size=128,
        intermediate_size=256,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return str(folder)


def measure(
    server: Server,
    name: str,
    expectation: Expectation,
    cases: Sequence[Case],
    alone: Sequence[Answer],
    jobs: Sequence[Job],
    num_clients: int,
    is_salted: bool = False,
    has_memory: bool = False,
) -> Result:
    """Run the load, compare every answer, then look what is left.

    Args:
        alone: The cases' right answers.
        is_salted: Whether requests are kept from sharing prefixes.
        has_memory: Whether the server's memory is watched, which takes several jobs per client.
    """
    before, hits_before = wait_until_idle(server), _prefix_hits(server)
    memory: list[MemorySample] = []
    watch = _memory_watch(server, len(jobs), memory) if has_memory else lambda num_ended: None
    start = time.perf_counter()
    answered = run(server, cases, jobs, num_clients, is_salted, on_end=watch)
    wall_s = time.perf_counter() - start
    end = wait_until_idle(server)
    num_hits = _prefix_hits(server) - hits_before
    exact, free = _sorted_by(expectation, compare(cases, alone, answered))
    again = answers_alone(server, cases[:_NUM_AFTERWARDS])
    left = [job for job, answer in answered if not answer.is_finished and answer.error is None]
    return Result(
        name=name,
        expectation=expectation,
        num_finished=sum(answer.is_finished for _, answer in answered),
        num_left_waiting=sum(job.leaves_after_s is not None for job in left),
        num_left_streaming=sum(job.leaves_after_tokens is not None for job in left),
        num_cases=len(cases),
        num_cases_compared=len({job.case_idx for job, answer in answered if answer.is_finished}),
        num_preemptions=end.num_preemptions - before.num_preemptions,
        num_prefix_hits=num_hits,
        errors=[a.error for a in _all(alone, answered, again) if a.error is not None],
        differences=exact,
        num_free_differences=len(free),
        num_changed_afterwards=sum(
            a.token_ids != b.token_ids for a, b in zip(alone, again, strict=False)
        ),
        end=end,
        wall_s=wall_s,
        memory=memory,
    )


def _beside_dense(result: Result, alone: dict[str, list[Answer]]) -> Result:
    """The result with the number of answers that compression itself changes."""
    if result.name == DENSE or DENSE not in alone:
        return result
    pairs = zip(alone[result.name], alone[DENSE], strict=True)
    return replace(result, num_unlike_dense=sum(a.token_ids != b.token_ids for a, b in pairs))


def _all(
    alone: Sequence[Answer], answered: list[tuple[Job, Answer]], again: list[Answer]
) -> list[Answer]:
    return [*alone, *(answer for _, answer in answered), *again]


def _sorted_by(
    expectation: Expectation, differences: list[Difference]
) -> tuple[list[Difference], list[Difference]]:
    """The differences that must not be, and those that a hit may cause."""
    cases = expectation.exact_cases
    exact = [d for d in differences if cases is None or d.case_idx in cases]
    return exact, [d for d in differences if d not in exact]


def _is_never_compressed(case: Case) -> bool:
    if case.xargs is not None:
        return case.xargs.get("kv_compression") == "off"
    return len(case.prompt) + case.num_tokens <= BUDGET


def _prefix_hits(server: Server) -> int:
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=30) as response:
        lines = response.read().decode().splitlines()
    return sum(int(float(line.split()[-1])) for line in lines if line.startswith(_PREFIX_HITS))


def _memory_watch(
    server: Server, num_jobs: int, samples: list[MemorySample]
) -> Callable[[int], None]:
    """Fills `samples` as jobs end."""
    # The launcher starts one process; the engine is that one's child.
    children = psutil.Process().children()
    (root,) = (child for child in children if str(server.port) in child.cmdline())
    every = max(1, num_jobs // _NUM_MEMORY_SAMPLES)

    def watch(num_ended: int) -> None:
        if num_ended % every == 0:
            engine = sum(_resident_mib(child) for child in root.children(recursive=True))
            samples.append(MemorySample(num_ended, _resident_mib(root), engine))

    return watch


def _resident_mib(process: psutil.Process) -> float:
    return process.memory_info().rss / 2**20


def _arguments() -> argparse.Namespace:
    names = [configuration.name for configuration in CONFIGURATIONS]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=200, help="at a time; as many requests")
    parser.add_argument("--requests", type=int, default=2000, help="sent in all, repeated ones")
    parser.add_argument("--configuration", action="append", choices=names, help="default: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="write the report here, JSON")
    return parser.parse_args()


def main() -> int:
    options = _arguments()
    console = Console()
    # Now, because a checkout may change while this runs.
    described = environment.describe()
    cases = make_cases(options.clients, options.seed)
    jobs = make_jobs(cases, options.requests, options.seed + 1)
    results = []
    alone: dict[str, list[Answer]] = {}
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(Path(folder, "model"))
        for configuration in CONFIGURATIONS:
            if options.configuration and configuration.name not in options.configuration:
                continue
            log = Path(folder, "server.log")
            with Server(model, configuration.arguments(), log) as server:
                console.print(f"{configuration.name}: every request alone ...")
                right = alone[configuration.name] = answers_alone(server, cases)
                console.print(f"{configuration.name}: all clients at once ...")
                result = measure(
                    server,
                    configuration.name,
                    configuration.expectation(cases),
                    cases,
                    right,
                    jobs,
                    options.clients,
                    has_memory=options.requests >= _WARM_UP * options.clients,
                )
            console.print(f"{configuration.name}: {result.wall_s:.0f} s")
            results.append(_beside_dense(result, alone))
    console.print(table(results))
    violations = [sentence for result in results for sentence in result.violations()]
    if options.output is not None:
        report = {
            "command": f"make load CLIENTS={options.clients} REQUESTS={options.requests}",
            "environment": described,
            "prompt_lengths": sorted(len(case.prompt) for case in cases),
            "runs": [result.to_dict() for result in results],
        }
        write(options.output, report)
        console.print(f"written to {options.output}")
    for sentence in violations:
        console.print(sentence, style="red")
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main())
