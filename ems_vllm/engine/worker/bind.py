# SPDX-License-Identifier: Apache-2.0
"""Binds vLLM's metadata builders and attention layers to a compressed group."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ems_vllm.engine.attention.head_rows import SPLITTINGS, LayerRows

if TYPE_CHECKING:
    from ems_vllm.engine.attention.bindings import MetadataRewriter


def bind(rewriter: MetadataRewriter, runner: Any, layers: Mapping[str, Any]) -> None:
    """Make the attention of a group call its rewriter and observers.

    Args:
        rewriter: Of the group.
        runner: vLLM's model runner, whose metadata builders are changed.
        layers: vLLM's attention layers by name.
    """
    group = rewriter.group
    attn_groups = runner.attn_groups[group.tensors.group_id]
    for attn_group in attn_groups:
        for builder in attn_group.metadata_builders:
            builder.compression = rewriter
    for name in group.layer_names:
        layers[name].impl.compression = rewriter.layer(name)
    batch = rewriter.head_batch
    if batch is None:
        return
    # Attention runs over rows of one kv_head each.
    for attn_group in attn_groups:
        splitting = SPLITTINGS[attn_group.backend.get_name()]
        for builder in attn_group.metadata_builders:
            splitting.builder(builder, batch.num_heads)
    for index, name in enumerate(group.layer_names):
        layer = layers[name]
        layer.impl.head_rows = LayerRows(layer.impl, layer.attn_backend.get_name(), batch, index)
