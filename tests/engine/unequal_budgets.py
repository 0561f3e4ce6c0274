# SPDX-License-Identifier: Apache-2.0
"""Requests and disturbances by which unequal budgets are tested on the engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import interpreter
from engine.arrivals import Arrival, serve
from engine.block_guard import guarded
from engine.harness import LLAMA, EngineProbe, tokens
from processes import fork_script

from ems_vllm.config import RequestOptions, load_config
from ems_vllm.engine.worker.start_log import log_start
from ems_vllm.eval.transformers_engine.engine import TransformersEngine

BUDGET = 64
COMPRESSION = {
    "recipe": "ems",
    "budget": BUDGET,
    "max_budget": 8192,
    "recent_window": 32,
    "recompress_interval": 32,
    "min_blocks_saved": 3,
}
OPTIONS = {"max_model_len": 1280}

# Compressed at its end, and its answer once more. 24 blocks lie before the recent window, of which
# the two levels of a pyramid keep 7 and 1.
LONG = tokens(420, seed=5)
# Of its 6 blocks the first level of a pyramid keeps 5, which is not worth a compaction; that comes
# late in its answer. The second level keeps 3.
SHORT = tokens(130, seed=6)
# Enough for what each is there for.
LONG_ANSWER, SHORT_ANSWER = 40, 140
IDENTITY_LENGTHS = (1, 15, 16, 17, 130, 1000)


def both(extra_args: dict[str, Any] | None = None) -> list[Arrival]:
    """LONG, with arguments of its own, and SHORT."""
    return [Arrival(0, LONG, LONG_ANSWER, extra_args), Arrival(0, SHORT, SHORT_ANSWER)]


def group_stats(probe: EngineProbe) -> list[dict[str, int]]:
    return probe.llm.collective_rpc("kv_compression_stats")[0]


def increase(probe: EngineProbe, before: list[dict[str, int]], key: str) -> list[int]:
    """What a counter of each group grew by."""
    pairs = zip(group_stats(probe), before, strict=True)
    return [after[key] - earlier[key] for after, earlier in pairs]


@contextmanager
def chunks_of(probe: EngineProbe, size: int) -> Iterator[None]:
    with mock.patch.object(probe.scheduler, "max_num_scheduled_tokens", size):
        yield


@contextmanager
def few_blocks(probe: EngineProbe, count: int) -> Iterator[None]:
    """Only `count` blocks of the pool are free; the cache is forgotten before."""
    assert probe.llm.reset_prefix_cache()
    held = probe.pool.get_new_blocks(probe.pool.get_num_free_blocks() - count)
    try:
        yield
    finally:
        probe.pool.free_blocks(held)


def identity_prompts() -> list[list[int]]:
    return [tokens(length, seed=length) for length in IDENTITY_LENGTHS]


def answers(
    probe: EngineProbe,
    before_step: Callable[[int], None] = lambda step: None,
    extra_args: dict[str, Any] | None = None,
) -> list[list[int]]:
    """Answers to LONG, with arguments of its own, and SHORT, which run at the same time."""
    outputs = serve(probe, both(extra_args), before_step)
    return [list(output.outputs[0].token_ids) for output in outputs]


def disturbed(
    probe: EngineProbe, extra_args: dict[str, Any] | None = None
) -> dict[str, list[list[int]]]:
    """The same of an engine that is disturbed, by what disturbs it."""
    found = {}
    assert probe.llm.reset_prefix_cache()
    with guarded(probe):
        probe.generate([[*LONG[:240], 7, 7], [*SHORT[:48], 7, 7]], 4)
        found["shared prefix"] = answers(probe, extra_args=extra_args)
        found["warm"] = answers(probe, extra_args=extra_args)
        assert probe.llm.reset_prefix_cache()
        with chunks_of(probe, 37):
            found["chunks"] = answers(probe, extra_args=extra_args)
        assert probe.llm.reset_prefix_cache()

        def preempt(step: int) -> None:
            # In a prompt, after the first compactions, and after the late one.
            if step in (1, 30, SHORT_ANSWER):
                probe.scheduler._preempt_request(probe.scheduler.running.pop(), 0.0)

        found["preempted"] = answers(probe, preempt, extra_args)
    return found


def answers_of_transformers(
    compression: dict[str, Any],
    prompts: list[list[int]],
    num_tokens: int,
    extra_args: dict[str, Any] | None = None,
) -> list[list[int]]:
    """Greedy answers of the engine on transformers."""
    config, options = load_config(compression), RequestOptions.parse(extra_args)
    assert config is not None
    ours = TransformersEngine.load(LLAMA, "cpu", "float32")
    found = []
    for prompt in prompts:
        logits, request = ours.process(prompt, config, options)
        answer = [int(logits.argmax())]
        while len(answer) < num_tokens:
            answer.append(int(request.step(answer[-1]).argmax()))
        found.append(answer)
    return found


def start_log(probe: EngineProbe, compression: dict[str, Any], num_tokens: int) -> list[str]:
    """What a server says at start-up of requests of `num_tokens` tokens, line by line."""
    worker, logger = probe.worker, mock.Mock()
    config = load_config(compression)
    assert config is not None
    kv_cache_config, layers = worker.model_runner.kv_cache_config, worker._attention_layers()
    log_start(logger, config, kv_cache_config, layers, num_tokens, worker._footprint())
    return [call.args[0] % call.args[1:] for call in logger.info.call_args_list]


def found_by_runner_v2(
    compression: dict[str, Any],
    lengths: tuple[int, ...],
    num_tokens: int = 20,
    extra_args: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Answers and compactions by group, of vLLM's second model runner."""
    case = {
        "compression": compression,
        "model": LLAMA,
        "lengths": lengths,
        "max_tokens": num_tokens,
        "extra_args": extra_args,
    }
    found: dict[str, Any] = fork_script(_V2_SCRIPT, case, interpreter.environment())
    return found


_V2_SCRIPT = """
import json, sys
import torch
torch.cuda.get_device_capability = lambda *args, **kwargs: (9, 0)
from engine.harness import engine, tokens
case = json.loads(sys.argv[1])
prompts = [tokens(length, seed=length) for length in case["lengths"]]
with engine(case["compression"], case["model"], max_model_len=1280) as probe:
    answers = probe.generate(prompts, case["max_tokens"], case["extra_args"])
    stats = probe.llm.collective_rpc("kv_compression_stats")[0]
    probe.assert_pool_is_empty()
    print(json.dumps({
        "answers": answers,
        "runner": type(probe.worker.model_runner).__module__,
        "compactions": [group["num_compactions"] for group in stats],
    }))
"""
