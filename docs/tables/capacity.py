# SPDX-License-Identifier: Apache-2.0
"""How many requests fit a card, dense and compressed: arithmetic of `ems-vllm plan --pool-gib`."""

from __future__ import annotations

from typing import NamedTuple

from ems_vllm.capacity import pool_columns, pool_fit, request_columns
from ems_vllm.config import load_config
from ems_vllm.config.cache_shape import CacheShape
from tables.markdown import table


class Model(NamedTuple):
    """A model with grouped queries, in bfloat16.

    Attributes:
        weights_gib: Of all its weights.
    """

    name: str
    shape: CacheShape
    weights_gib: float


class Machine(NamedTuple):
    """GPUs that share a model by tensor parallelism.

    Attributes:
        memory_gib: Usable of each, a little below what it is sold with.
    """

    name: str
    num_gpus: int
    memory_gib: float


LLAMA_8B = Model("Llama 3.1 8B", CacheShape.of(32, 8, 128, "bfloat16"), 15.0)
LLAMA_70B = Model("Llama 3.3 70B", CacheShape.of(80, 8, 128, "bfloat16"), 131.4)
CASES = (
    (LLAMA_8B, Machine("H100 80 GB", 1, 79)),
    (LLAMA_8B, Machine("A100 40 GB", 1, 39)),
    (LLAMA_8B, Machine("L40S 48 GB", 1, 44)),
    (LLAMA_70B, Machine("4 x H100 80 GB", 4, 79)),
    (LLAMA_70B, Machine("8 x A100 40 GB", 8, 39)),
    (LLAMA_70B, Machine("4 x L40S 48 GB", 4, 44)),
)
# vLLM's default, and what activations, graphs and what compression holds beside the cache take.
_UTILIZATION = 0.92
_OTHERS_GIB = 2.1
PROMPTS = {"8k": 8_192, "32k": 32_768, "128k": 131_072}
SIZES = {"25 %": {"ratio": 0.25}, "1,024": {"budget": 1024}}
_NEW_TOKENS = 1024
_BLOCK_SIZE = 16


def pool_gib(model: Model, machine: Machine) -> int:
    """Left for the cache on all GPUs together, in whole GiB."""
    of_each = _UTILIZATION * machine.memory_gib - _OTHERS_GIB
    return int(machine.num_gpus * of_each - model.weights_gib)


def capacity() -> str:
    """Requests at a time by model, machine and length; compressed, one of them coming in."""
    sizes = " / ".join(("dense", *SIZES))
    head = ["", "GiB for the cache", *(f"{length}: {sizes}" for length in PROMPTS)]
    rows = []
    for model, machine in CASES:
        gib = pool_gib(model, machine)
        cells = (" / ".join(map(str, fits(model, gib, length))) for length in PROMPTS.values())
        rows.append([f"{model.name}, {machine.name}", str(gib), *cells])
    return table(head, rows)


def fits(model: Model, gib: int, prompt_len: int) -> list[int]:
    """Dense, then by size."""
    columns = pool_columns(gib * 2**30, model.shape.column_bytes(_BLOCK_SIZE))
    found = []
    for size in SIZES.values():
        config = load_config({"recipe": "ems", "budget": None, "ratio": None} | size)
        assert config is not None
        of_request = request_columns(config.plan_settings, prompt_len, _NEW_TOKENS, _BLOCK_SIZE)
        fit = pool_fit(of_request, columns)
        found = (found or [fit.dense]) + [fit.with_one_coming_in]
    return found
