# SPDX-License-Identifier: Apache-2.0
"""Tables of kv_heads that hold different numbers of entries, of one KV-cache group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vllm.distributed import get_tp_group

from ems_vllm.engine.attention.head_rows import why_not
from ems_vllm.engine.group.head_tables import HeadTables
from ems_vllm.engine.worker.head_deal import HeadsDiffer, shares_of_rank
from ems_vllm.engine.worker.refusals import HEAD_SHARES, UNSPLIT_HEADS

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from ems_vllm.config import KVCompressionConfig
    from ems_vllm.engine.kv_cache_spec import CompressedAttentionSpec


def head_tables(
    config: KVCompressionConfig,
    vllm_config: VllmConfig,
    spec: CompressedAttentionSpec,
    layer_names: Sequence[str],
    owners: Sequence[str],
    layers: Mapping[str, Any],
) -> HeadTables | None:
    """What the kv_heads of a KV-cache group own; None where all of a layer keep as much.

    Args:
        spec: Of the group.
        layer_names: Of the group; `owners` are those that have a cache of their own.
        layers: vLLM's attention layers by name, with their caches.

    Raises:
        ConfigError: its kv_heads cannot own different numbers, or the allocator deals to others.
    """
    allocator = config.allocator
    if not allocator.deals_to_heads:
        return None
    model = vllm_config.model_config
    for name in layer_names:
        reason = why_not(layers[name], model.is_mm_prefix_lm)
        if reason is not None:
            raise UNSPLIT_HEADS.error(allocator.name(), config.recipe, reason=reason)
    shares, of_layers = allocator.head_shares(), None
    if shares is not None:
        ranks = get_tp_group()
        try:
            of_layers = shares_of_rank(
                shares,
                owners,
                num_heads=spec.num_kv_heads,
                total_heads=model.get_total_num_kv_heads(),
                rank=ranks.rank_in_group,
                num_ranks=ranks.world_size,
            )
        except HeadsDiffer as error:
            raise HEAD_SHARES.error(allocator.name(), config.recipe, reason=error) from None
    max_num_seqs = vllm_config.scheduler_config.max_num_seqs
    device = layers[owners[0]].kv_cache.device
    return HeadTables(len(owners), spec.num_kv_heads, max_num_seqs, device, of_layers)
