# SPDX-License-Identifier: Apache-2.0
"""Which layers are compressed, and why the others are not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm.platforms import current_platform
from vllm.v1.kv_cache_interface import FullAttentionSpec

from ems_vllm.engine import kernels
from ems_vllm.engine.cache_dtype import FLOAT8_CACHES
from ems_vllm.engine.kv_cache_spec import CompressedAttentionSpec

if TYPE_CHECKING:
    import torch
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec

    from ems_vllm.policies.base import Scorer


@dataclass(frozen=True)
class LayerChoice:
    """Layers by what happens to their cache.

    Attributes:
        compressed: Names of the layers that are compressed.
        kept: Name of every other layer with the reason in a few words.
    """

    compressed: frozenset[str]
    kept: Mapping[str, str]

    def describe_kept(self) -> str:
        """The reasons with the number of layers each, for the log; empty where none is kept."""
        counts = Counter(self.kept.values())
        return ", ".join(
            f"{count} {'layer' if count == 1 else 'layers'}: {reason}"
            for reason, count in counts.items()
        )


def choose_layers(
    specs: Mapping[str, KVCacheSpec],
    layers: Mapping[str, Any] | None = None,
    scorer: Scorer | None = None,
) -> LayerChoice:
    """Full-attention layers are compressed; whatever is bounded or recurrent already stays.

    That depends on what there are kernels for as well: see `kernels`.

    Scores are softmax(scale * q.k) over the entries of the cache. An attention sink (a learned
    logit in the denominator, as in gpt-oss) is left out: it would scale every score of one query
    by the same factor below 1, so the order of the entries within a query is exact, and a query
    that mostly attends to the sink counts for as much as any other.

    Args:
        specs: KV-cache spec by layer.
        layers: vLLM's attention layers by name, where they are known.
        scorer: Of the policy in use, where it is known.
    """
    layers = layers or {}
    reasons = {
        name: _reason_to_keep(spec) or _reason_in_layer(layers.get(name), spec, scorer)
        for name, spec in specs.items()
    }
    return LayerChoice(
        compressed=frozenset(name for name, reason in reasons.items() if reason is None),
        kept={name: reason for name, reason in reasons.items() if reason is not None},
    )


def mixed_layer(kv_cache_config: KVCacheConfig, specs: Mapping[str, KVCacheSpec]) -> str | None:
    """A layer that shares its KV-cache group with layers of another kind, if there is one.

    vLLM merges the specs of the layers of a group. Where it merges a compressed one with another
    kind of full attention, the result is either plain, and then nothing is compressed, or
    scheduler and worker see different kinds, and blocks are freed that the worker still reads.

    Args:
        kv_cache_config: What vLLM made of the specs.
        specs: What the worker declared.
    """
    for group in kv_cache_config.kv_cache_groups:
        is_compressed = isinstance(group.kv_cache_spec, CompressedAttentionSpec)
        for name in group.layer_names:
            # Layers that share another one's cache have no spec of their own.
            spec = specs.get(name)
            if spec is not None and isinstance(spec, CompressedAttentionSpec) != is_compressed:
                return name
    return None


def _reason_to_keep(spec: KVCacheSpec) -> str | None:
    if not isinstance(spec, FullAttentionSpec):
        return f"{type(spec).__name__.removesuffix('Spec')} has a cache of its own kind"
    if type(spec) is not FullAttentionSpec:
        return f"{type(spec).__name__.removesuffix('Spec')} is a special full attention"
    if spec.sliding_window is not None:
        return "sliding window"
    if spec.attention_chunk_size is not None:
        return "chunked local attention"
    if spec.non_causal:
        return "not causal"
    if spec.head_size_v != spec.head_size:
        return "keys and values differ in size"
    return kernels.without_head_size(_device(), spec.head_size)


def _reason_in_layer(layer: Any, spec: KVCacheSpec, scorer: Scorer | None) -> str | None:
    """What the spec does not tell."""
    if layer is None:
        return None
    cache_dtype = _cache_dtype(layer, spec)
    if reason := kernels.without_cache_dtype(_device(), cache_dtype):
        return reason
    impl = layer.impl
    if getattr(impl, "alibi_slopes", None) is not None:
        # The bias depends on the column, and compression moves entries to other columns.
        return "ALiBi"
    if scorer is None or not scorer.reads_queries:
        return None
    if getattr(impl, "logits_soft_cap", None):
        # Scores without the cap are off by a factor that grows exponentially with the logit.
        return "soft-capped attention logits, which a scorer that reads queries cannot follow"
    return kernels.without_dtypes(_device(), _name(layer.dtype), cache_dtype)


def _device() -> str:
    return "cuda" if current_platform.is_cuda() else "cpu"


def _cache_dtype(layer: Any, spec: FullAttentionSpec) -> str:
    # vLLM stores float8 as bytes.
    return "float8_e4m3fn" if layer.kv_cache_dtype in FLOAT8_CACHES else _name(spec.dtype)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
