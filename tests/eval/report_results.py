# SPDX-License-Identifier: Apache-2.0
"""Made-up results of known shape: six methods, six budgets, six tasks, three seeds.

A prompt has a difficulty that all methods share, as real prompts have; methods differ in how much
of it they bear at a budget. The full cache fails `vt` and cannot be compared on it.
"""

from __future__ import annotations

import math

import numpy as np

from ems_vllm.eval.records.results import EvalResult, MethodResult, SampleResult, Serving

BUDGETS = (0.02, 0.03, 0.06, 0.125, 0.25, 0.5)
LENGTHS = (1024, 2048, 4096)
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
SEEDS = (11, 12, 13)
CONTEXT = 4096
# How well a method uses its budget, as powers of two of the budget.
VLLM = {"ems": 2.2, "snapkv": 1.1, "h2o": 0.6, "streaming_llm": -0.6, "knorm": -0.2, "random": -1.5}
KVPRESS = {"SnapKVPress": 1.15, "PyramidKVPress": 1.0, "TOVAPress": 0.7, "KnormPress": -0.2}
# Score of the full cache, and how much budget the task needs.
TASKS = {
    "niah_single": (0.99, 0.0),
    "niah_multikey": (0.95, 0.7),
    "kv_retrieval": (0.90, 1.2),
    "fwe": (0.85, -0.6),
    "vt": (0.31, 0.5),
}
BITS = "book_bits"


def results(
    methods: dict[str, float] | None = None,
    engine: str = "vllm",
    *,
    samples: int = 5,
    full: bool = True,
    serving: bool = True,
    **fields: object,
) -> EvalResult:
    """One run; the same arguments give the same result."""
    methods = VLLM if methods is None else methods
    found = [_method("full", engine, None, 0.0, samples, serving)] if full else []
    found += [
        _method(name, engine, budget, skill, samples, serving)
        for name, skill in methods.items()
        for budget in BUDGETS
    ]
    return EvalResult.model_validate(
        {
            "model": "models/ems-tiny",
            "preset": "standard",
            "created": "2026-01-02T03:04:05+00:00",
            "environment": {"vllm": "0.32.0", "torch": "2.13.0", "commit": "0123456789abcdef"},
            "higher_is_better": {**dict.fromkeys(TASKS, True), BITS: False},
            "methods": found,
            **fields,
        }
    )


def _method(
    name: str, engine: str, budget: float | None, skill: float, samples: int, serving: bool
) -> MethodResult:
    rows = []
    for task in [*TASKS, BITS]:
        depths: tuple[float | None, ...] = DEPTHS if task.startswith("niah") else (None,)
        for length in LENGTHS:
            for seed in SEEDS:
                for index in range(max(samples, len(depths))):
                    depth = depths[index % len(depths)]
                    score = _score(name, task, length, depth, seed, index, budget, skill)
                    rows.append(
                        SampleResult(
                            task=task,
                            length=length,
                            depth=depth,
                            seed=seed,
                            index=index,
                            score=score,
                            prompt_tokens=length - 7,
                            output=f"The answer is {seed * 1000 + index}." if score else "I do",
                        )
                    )
    return MethodResult(
        method=name,
        engine=engine,
        budget=None if budget is None else round(budget * CONTEXT),
        budget_fraction=budget,
        samples=rows,
        serving=_serving(budget, skill) if serving else Serving(),
    )


def _score(
    name: str,
    task: str,
    length: int,
    depth: float | None,
    seed: int,
    index: int,
    budget: float | None,
    skill: float,
) -> float:
    place = [length, seed, index, sum(task.encode())]
    difficulty = np.random.default_rng(place).random()
    noise = np.random.default_rng([*place, sum(name.encode())]).normal()
    lost = 0.0
    if budget is not None:
        need = TASKS.get(task, (0, 0.0))[1] + math.log2(length / CONTEXT) / 2
        if depth is not None:
            need += 1.2 * math.sin(math.pi * depth)
        lost = 1 / (1 + math.exp(1.1 * (math.log2(budget) + 5.2 + skill - need)))
    if task == BITS:
        return round(1.1 + 0.2 * difficulty + 0.4 * lost + 0.01 * noise, 4)
    chance = TASKS[task][0] * (1 - lost)
    if task == "fwe":
        return round(min(max(chance + 0.2 * (0.5 - difficulty) + 0.05 * noise, 0), 1), 3)
    return float(difficulty + 0.05 * noise < chance)


def _serving(budget: float | None, skill: float) -> Serving:
    kept = 1.0 if budget is None else budget + 0.03
    return Serving(
        kv_bytes_per_request=kept * CONTEXT * 4096,
        blocks_per_request=kept * CONTEXT / 16,
        peak_blocks=round(kept * CONTEXT),
        ttft_s=0.8 if budget is None else 0.9 + 0.02 * skill,
        tpot_s=0.004 + 0.03 * kept,
        output_tokens_per_s=20 + 60 * (1 - kept) + 2 * skill,
    )
