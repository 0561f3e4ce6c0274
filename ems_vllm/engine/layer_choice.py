# SPDX-License-Identifier: Apache-2.0
"""Which layers are compressed, and why the others are not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm.platforms import current_platform
from vllm.v1.kv_cache_interface import FullAttentionSpec

import ems_vllm
from ems_vllm.engine.kv_cache_spec import CompressedAttentionSpec

if TYPE_CHECKING:
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
        """The reasons with the number of layers each, for the log."""
        counts = Counter(self.kept.values())
        return ", ".join(f"{count} layers: {reason}" for reason, count in counts.items()) or "none"


def choose_layers(
    specs: Mapping[str, KVCacheSpec],
    layers: Mapping[str, Any] | None = None,
    scorer: Scorer | None = None,
) -> LayerChoice:
    """Full-attention layers are compressed; whatever is bounded or recurrent already stays.

    On a GPU that depends on the head size as well: kernels are compiled for some. Those of the CPU
    take any.

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
        name: _reason_to_keep(spec) or _reason_in_layer(layers.get(name), scorer)
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
    return _reason_in_head_size(spec.head_size)


def _reason_in_head_size(head_size: int) -> str | None:
    if not current_platform.is_cuda():
        return None
    sizes = ems_vllm.build_info()["cuda_head_sizes"]
    if head_size in sizes:
        return None
    known = ", ".join(map(str, sizes))
    return f"head_size {head_size}, for which there is no CUDA kernel (there are for {known})"


def _reason_in_layer(layer: Any, scorer: Scorer | None) -> str | None:
    """What the spec does not tell."""
    impl = getattr(layer, "impl", None)
    if getattr(impl, "alibi_slopes", None) is not None:
        # The bias depends on the column, and compression moves entries to other columns.
        return "ALiBi"
    reads_queries = scorer is not None and (scorer.uses_global or scorer.uses_window)
    if reads_queries and getattr(impl, "logits_soft_cap", None):
        # Scores without the cap are off by a factor that grows exponentially with the logit.
        return "soft-capped attention logits, which a scorer that reads queries cannot follow"
    return None
