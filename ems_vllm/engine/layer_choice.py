# SPDX-License-Identifier: Apache-2.0
"""Which layers are compressed, and why the others are not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm.v1.kv_cache_interface import FullAttentionSpec

if TYPE_CHECKING:
    from vllm.v1.kv_cache_interface import KVCacheSpec


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


def choose_layers(specs: Mapping[str, KVCacheSpec]) -> LayerChoice:
    """Full-attention layers are compressed; whatever is bounded or recurrent already stays."""
    reasons = {name: _reason_to_keep(spec) for name, spec in specs.items()}
    return LayerChoice(
        compressed=frozenset(name for name, reason in reasons.items() if reason is None),
        kept={name: reason for name, reason in reasons.items() if reason is not None},
    )


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
    return None
