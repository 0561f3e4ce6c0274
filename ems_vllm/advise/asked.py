# SPDX-License-Identifier: Apache-2.0
"""What the command is given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Asked:
    """What the command was given; see there."""

    model: str
    prompts: Path
    recipe: str
    budgets: Sequence[str]
    settings: dict[str, Any]
    pool_gib: float | None
    kv_cache_memory_bytes: int | None
    tensor_parallel_size: int
    max_num_seqs: int | None
    block_size: int
    kv_cache_dtype: str | None
    output_len: int
    token_ms: float
    prompt_rate: float
    quality: bool
    sample: int
    tokens: int
    max_prompt_len: int
    max_kl: float
    seed: int
    device: str
    dtype: str
