# SPDX-License-Identifier: Apache-2.0
"""Variants at budgets, each with a digest of all that its measurements depend on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from ems_vllm.eval.lab.sizes import EVERYTHING, ByteBudget, Size
from ems_vllm.eval.records.budget import Budget
from ems_vllm.eval.records.method import TRANSFORMERS, Method
from ems_vllm.eval.transformers_engine.quantised import CacheFormat, cache_format
from ems_vllm.eval.transformers_engine.server_config import request_options

if TYPE_CHECKING:
    from ems_vllm.config import KVCompressionConfig, RequestOptions
    from ems_vllm.config.cache_shape import CacheShape
    from ems_vllm.eval.lab.variants import Variant
    from ems_vllm.eval.records.prompt_files import PromptLine

# What every measurement depends on, and what those of a compressed cache do.
_FORCING = ("eval/transformers_engine/**/*.py", "eval/lab/**/*.py")
_COMPRESSION = (
    "head_shares.py",
    "layer_shares.py",
    "plan.py",
    "eval/records/budget.py",
    "policies/**/*.py",
    "ops/**/*.py",
    "*.so",
)


@dataclass(frozen=True)
class Cell:
    """A variant at a size.

    Attributes:
        variant: Its name.
        size: Entries per kv_head in all, or bytes.
        config: The server's.
        cache_format: How entries are stored.
        digest: Equal for equal settings, whatever the variant is called. Another one after a change
            of the code, so that what was measured before is measured again.
    """

    variant: str
    size: Size
    config: KVCompressionConfig
    cache_format: CacheFormat
    digest: str

    def options(
        self, prompt: PromptLine, block_size: int, shape: CacheShape
    ) -> RequestOptions | None:
        """What a request asks for; None where the size has no room for it."""
        budget = self.size
        if isinstance(budget, ByteBudget):
            num_tokens = len(prompt.prompt_token_ids)
            budget = Budget(count=budget.total(num_tokens, shape, self.cache_format))
        method = Method(self.variant, TRANSFORMERS, budget)
        return request_options(method, prompt, self.config, block_size)


def cells(
    variants: Sequence[Variant],
    configs: Mapping[str, KVCompressionConfig],
    sizes: Sequence[Size],
    errors: bool,
) -> list[Cell]:
    """Full variants once, then all others at all sizes, size by size.

    Args:
        variants: What is compared.
        configs: Of servers, by the name of the variant.
        sizes: What compressed requests may hold.
        errors: Whether errors of attention are measured.
    """
    full = [(EVERYTHING, variant) for variant in variants if variant.is_full]
    others = [(size, variant) for size in sizes for variant in variants if not variant.is_full]
    found = []
    for size, variant in (*full, *others):
        config, dtype = configs[variant.name], variant.kv_cache_dtype
        # Its name in the recipe changes nothing, and nothing matters to what is not compressed.
        settings = {} if variant.is_full else {**config.to_dict(), "recipe": ""}
        code = _code() if variant.is_full else [_code(), _code(*_COMPRESSION)]
        depends = json.dumps([code, settings, str(size), dtype, errors], sort_keys=True)
        found.append(Cell(variant.name, size, config, cache_format(dtype), digest(depends)))
    return found


def digest(text: str) -> str:
    """A short digest of a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def prompt_digest(prompt: PromptLine) -> str:
    """Of all that a prompt is."""
    return digest(prompt.model_dump_json())


@cache
def _code(*paths: str) -> str:
    """Digest of code that measurements depend on.

    Args:
        paths: Patterns of files in the package; without any, what all measurements depend on.
    """
    package = Path(str(resources.files("ems_vllm")))
    files = [file for pattern in paths or _FORCING for file in package.glob(pattern)]
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(files))).hexdigest()
