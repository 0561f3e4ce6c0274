# SPDX-License-Identifier: Apache-2.0
"""Attention over rows of one kv_head each, by kernels that know nothing of it.

Where the kv_heads of a layer hold different numbers of entries, each is a sequence of its own to
the kernel: one kv_head, its group of query heads, and pages of one kv_head instead of blocks.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.kv_cache_interface import KVCacheLayout

from ems_vllm.engine.group.layer_stack import as_pages

if TYPE_CHECKING:
    import torch

    from ems_vllm.engine.attention.head_batch import HeadBatch

# The heads of a block follow each other, so that a page is in one piece.
LAYOUT = KVCacheLayout.LBHNC

# Graphs hold decoding batches of one token each: longer rows are put into another order, which
# depends on the batch.
MOST_GRAPHS = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE

_is_on = False


def read_by_head(is_on: bool) -> None:
    """Whether kv_heads hold different numbers of entries in this process.

    vLLM asks backends for layouts and graphs before there are layers that could tell.
    """
    global _is_on
    _is_on = is_on


def reads_by_head() -> bool:
    return _is_on


def _split_triton(builder: Any, num_heads: int) -> None:
    # Of its scratch memory, each row takes the part of its own query heads.
    builder.seq_threshold_3D *= num_heads
    builder.max_seqs_64_segments *= num_heads
    for name in ("softmax_segm_output", "softmax_segm_max", "softmax_segm_expsum"):
        scratch = getattr(builder, name)
        setattr(builder, name, scratch.unflatten(1, (num_heads, -1)).flatten(0, 1))
    _split_head_counts(builder, num_heads)


def _split_flash(builder: Any, num_heads: int) -> None:
    # It is made of the lengths in one layer, and each layer has others.
    builder.aot_schedule = False
    if builder.max_cudagraph_size is not None:
        builder.max_cudagraph_size *= num_heads
    _split_head_counts(builder, num_heads)


def _split_head_counts(builder: Any, num_heads: int) -> None:
    builder.num_heads_q //= num_heads
    builder.num_heads_kv = 1


def _split_torch_cpu(builder: Any, num_heads: int) -> None:
    pass


def _same(metadata: Any, seq_lens: torch.Tensor, block_table: torch.Tensor) -> Any:
    # It refers to the tensors that have just been written.
    return metadata


def _planned_again(metadata: Any, seq_lens: torch.Tensor, block_table: torch.Tensor) -> Any:
    """The CPU platform's metadata, which plans its calls by the lengths."""
    batch = replace(metadata.batch, seq_lens=seq_lens.tolist(), block_table=block_table)
    return replace(metadata, batch=batch, _calls={})


@dataclass(frozen=True)
class Splitting:
    """How a backend is made to take rows of one kv_head.

    Attributes:
        builder: Changes a metadata builder, given the number of kv_heads.
        metadata: What the builder built, for a layer whose lengths and tables have been written.
    """

    builder: Callable[[Any, int], None]
    metadata: Callable[[Any, torch.Tensor, torch.Tensor], Any] = _same


# By vLLM's name of the backend. The others plan on the host, by the lengths of all layers at once.
SPLITTINGS = {
    "TORCH_CPU": Splitting(_split_torch_cpu, _planned_again),
    "FLASH_ATTN": Splitting(_split_flash),
    "TRITON_ATTN": Splitting(_split_triton),
}


def why_not(layer: Any, is_mm_prefix_lm: bool) -> str | None:
    """Why the kv_heads of a layer cannot hold different numbers of entries, in a few words.

    Args:
        layer: vLLM's attention layer, with its cache.
        is_mm_prefix_lm: Whether image tokens of the model see each other.
    """
    reason = why_not_at_all(layer, is_mm_prefix_lm)
    if reason is not None:
        return reason
    try:
        as_pages(layer.kv_cache, 0)
    except RuntimeError:
        return f"the cache is not laid out as {LAYOUT.name}"
    return None


def why_not_at_all(layer: Any, is_mm_prefix_lm: bool) -> str | None:
    """As `why_not`, of a layer that has no cache yet."""
    backend = layer.attn_backend.get_name()
    if backend not in SPLITTINGS:
        return f"the attention backend {backend} takes lengths that are the same in all layers"
    if backend == "FLASH_ATTN" and is_mm_prefix_lm:
        return "FLASH_ATTN has room for the image tokens of one row for each request"
    if layer.kv_sharing_target_layer_name:
        return "layers share the cache of another one"
    if getattr(layer.impl, "sinks", None) is not None:
        return "attention sinks are of the query heads of a layer, and a row has those of a kv_head"
    return None


class LayerRows:
    """Runs the attention of one layer over rows of one kv_head.

    Args:
        impl: The layer's attention implementation.
        backend: vLLM's name of its backend.
        batch: Of the layer's group.
        layer: Its index in the group.
    """

    def __init__(self, impl: Any, backend: str, batch: HeadBatch, layer: int) -> None:
        self.impl = copy.copy(impl)
        self.impl.num_heads = self.impl.num_heads // self.impl.num_kv_heads
        self.impl.num_kv_heads = 1
        self._metadata_of_layer = SPLITTINGS[backend].metadata
        self._batch = batch
        self._layer = layer

    def attend(
        self,
        forward: Callable[..., Any],
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        metadata: Any,
        output: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        """As `forward` of the implementation, for the batch of requests.

        Args:
            forward: Of the implementation's class, which takes `self.impl` first.
            query: [num_tokens, num_heads, head_size].
            kv_cache: [num_blocks, num_kv_heads, block_size, 2 * head_size].
            metadata: Built from HeadBatch.split.
            output: Like query, or its last two dimensions flattened; written.
        """
        batch = self._batch
        metadata = self._metadata_of_layer(metadata, *batch.write(self._layer))
        pages = as_pages(kv_cache, 0)
        group = (-1, self.impl.num_heads, self.impl.head_size)
        # Queries may lie among keys and values; then this is a copy.
        row_query, row_output = query.reshape(group), output.view(group)
        order = batch.token_order
        if order is None:
            into = row_output
        else:
            row_query = row_query[order]
            into = row_output.new_empty(row_query.shape)
        forward(self.impl, layer, row_query, key, value, pages, metadata, into, *args, **kwargs)
        if order is not None:
            row_output[order] = into
        return output

    def of_tokens(self, lse: torch.Tensor) -> torch.Tensor:
        """[num_tokens, num_heads], float32: the implementation's softmax LSE of its rows."""
        order = self._batch.token_order
        if order is not None:
            of_pairs = lse.new_empty((len(order), lse.shape[1]))
            of_pairs[order] = lse[: len(order)]
            lse = of_pairs
        return lse.reshape(lse.shape[0] // self._batch.num_heads, -1)
