# SPDX-License-Identifier: Apache-2.0
"""The block pool of an engine, as vLLM says it in the labels of a metric."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ems_vllm.doctor.live.page import Page

# Block 0 of vLLM's pool is never given to a request.
_NULL_BLOCKS = 1
# Requests that hold so many times the columns of their length have layers of several kinds (ours).
_SEVERAL_KINDS = 1.01


@dataclass(frozen=True)
class Pool:
    """The pool of one engine; a data-parallel server's are taken to be alike.

    Attributes:
        num_blocks: Blocks that requests can hold.
        block_size: Tokens of a block.
        is_uniform: Whether a block is a column of all layers. If not, layers of the model differ in
            kind, and a request holds more blocks than its length has columns.
        cache_dtype: vLLM's name of it.
    """

    num_blocks: int
    block_size: int
    is_uniform: bool
    cache_dtype: str


def pool_of(page: Page) -> Pool | None:
    """From a page of metrics; None where it does not say."""
    infos = page.info("vllm:cache_config_info")
    if not infos:
        return None
    labels = infos[0]
    blocks, block_size = _number(labels, "num_gpu_blocks"), _number(labels, "block_size")
    if not blocks or not block_size:
        return None
    # vLLM adds the blocks of all engines up, and says the sum for each.
    num_blocks = int(blocks) // len(infos)
    return Pool(
        num_blocks=num_blocks - _NULL_BLOCKS,
        block_size=int(block_size),
        is_uniform=_is_uniform(labels, num_blocks, int(block_size)),
        cache_dtype=labels.get("cache_dtype", "auto"),
    )


def _is_uniform(labels: Mapping[str, str], num_blocks: int, block_size: int) -> bool:
    """By how many of the longest requests vLLM says that fit."""
    tokens, fit = (
        _number(labels, "kv_cache_size_tokens"),
        _number(labels, "kv_cache_max_concurrency"),
    )
    if not tokens or not fit:
        return True
    longest = round(tokens / fit)
    return num_blocks / fit <= _SEVERAL_KINDS * -(-longest // block_size)


def _number(labels: Mapping[str, str], key: str) -> float | None:
    """Of a label, which may be missing or "None"."""
    try:
        return float(labels[key])
    except (KeyError, ValueError):
        return None
