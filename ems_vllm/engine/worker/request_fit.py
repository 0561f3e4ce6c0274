# SPDX-License-Identifier: Apache-2.0
"""How many requests of a length fit the cache of a server, dense and compressed: arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ems_vllm.config.request import RequestOptions
from ems_vllm.engine.kv_cache_spec import CompressedAttentionSpec

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

    from ems_vllm.engine.worker.memory import Footprint
    from ems_vllm.plan import PlanSettings


@dataclass(frozen=True)
class GroupColumns:
    """What one request holds of the columns of one compressed group.

    Attributes:
        dense: Without compression.
        compressed: At most, once the prompt has been compressed.
    """

    dense: int
    compressed: int


def group_columns(settings: PlanSettings, block_size: int, num_tokens: int) -> GroupColumns:
    """Columns of a request whose prompt is all but one of `num_tokens`.

    Args:
        settings: Of the group.
        block_size: Tokens per block.
        num_tokens: Length of the request, for example max_model_len.
    """
    plan = settings.plan(num_tokens - 1, block_size, RequestOptions())
    dense = -(-num_tokens // block_size)
    if not plan.compresses_prompt:
        return GroupColumns(dense, dense)
    # The state between two compactions repeats, so the first interval has the greatest one.
    end = num_tokens + max(settings.recompress_interval, block_size)
    steady = range(num_tokens + 1, end + 1)
    return GroupColumns(dense, min(dense, max(plan.max_live_columns(n) for n in steady)))


@dataclass(frozen=True)
class RequestFit:
    """Requests of one length.

    Attributes:
        columns: Of one, of all groups: its blocks.
        dense, compressed: How many fit, fractions counted, when their prompts are over.
    """

    columns: GroupColumns
    dense: float
    compressed: float


def request_fit(
    kv_cache_config: KVCacheConfig, num_tokens: int, vllm_config: VllmConfig | None = None
) -> RequestFit | None:
    """How many requests fit.

    Args:
        kv_cache_config: The pool and its groups.
        num_tokens: Length of each, of which all but one are the prompt.
        vllm_config: By which vLLM says what groups hold that are not compressed, of requests of
            max_model_len tokens.

    Returns:
        None where there are such groups and no `vllm_config`.
    """
    of_groups = []
    for group in kv_cache_config.kv_cache_groups:
        spec = group.kv_cache_spec
        if isinstance(spec, CompressedAttentionSpec):
            of_groups.append(group_columns(spec.settings, spec.block_size, num_tokens))
        elif vllm_config is None:
            return None
        else:
            most = -(-spec.max_memory_usage_bytes(vllm_config) // spec.page_size_bytes)
            of_groups.append(GroupColumns(most, most))
    # A column of each group is a block.
    columns = GroupColumns(sum(c.dense for c in of_groups), sum(c.compressed for c in of_groups))
    # Block 0 is vLLM's null block.
    num_blocks = kv_cache_config.num_blocks - 1
    return RequestFit(columns, num_blocks / columns.dense, num_blocks / columns.compressed)


def describe_server(
    kv_cache_config: KVCacheConfig,
    footprint: Footprint,
    lengths: Sequence[int],
    vllm_config: VllmConfig,
) -> dict[str, Any]:
    """What a worker holds, and what fits, in plain types.

    Args:
        footprint: Of the worker.
        lengths: Of requests, in tokens. Where some layers are not compressed, only what fits of
            max_model_len is known.
    """
    longest = vllm_config.model_config.max_model_len
    groups, num_blocks = kv_cache_config.kv_cache_groups, kv_cache_config.num_blocks
    num_layers = sum(len(group.layer_names) for group in groups)
    num_compressed = sum(
        len(group.layer_names)
        for group in groups
        if isinstance(group.kv_cache_spec, CompressedAttentionSpec)
    )
    found = [
        (length, request_fit(kv_cache_config, length, vllm_config if length == longest else None))
        for length in lengths
    ]
    return {
        "num_layers": num_layers,
        "num_layers_compressed": num_compressed,
        "num_blocks": num_blocks - 1,
        "score_bytes": footprint.score_bytes(num_blocks),
        "query_bytes": footprint.ring_bytes(num_blocks),
        "workspace_bytes": footprint.workspace_bytes + footprint.head_bytes(num_blocks),
        "capacity": [
            {
                "num_tokens": length,
                "dense_blocks": fit.columns.dense,
                "compressed_blocks": fit.columns.compressed,
                "dense_requests": fit.dense,
                "compressed_requests": fit.compressed,
            }
            for length, fit in found
            if fit is not None
        ],
    }
