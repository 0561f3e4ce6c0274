# SPDX-License-Identifier: Apache-2.0
"""When a request is compressed, level by level of the layers that share a budget."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ems_vllm.config.errors import ConfigError
from ems_vllm.config.schema import KEY_PREFIX
from ems_vllm.eval.transformers_engine.cache import FULL_ATTENTION
from ems_vllm.eval.transformers_engine.scored_queries import ScoredQueries

if TYPE_CHECKING:
    from ems_vllm._C import CompressionPlan
    from ems_vllm.config import KVCompressionConfig
    from ems_vllm.head_shares import HeadShares
    from ems_vllm.plan import PlanSettings


@dataclass(frozen=True)
class LevelPlan:
    """A level of a request.

    Attributes:
        layers: Ascending indices of its layers, among all layers of the model.
        plan: When they are compressed, and into which columns.
        heads: By layer, how its kv_heads share these columns, whatever the prompt; None where all
            keep as much, or scores decide.
    """

    layers: tuple[int, ...]
    plan: CompressionPlan
    heads: Mapping[int, HeadShares] | None = None


def level_settings(
    config: KVCompressionConfig, kinds: Sequence[str]
) -> list[tuple[tuple[int, ...], PlanSettings]]:
    """Layers and settings of each level; where all layers have the same, there is one.

    Args:
        config: The server's.
        kinds: What each layer of the model attends to; see cache.layer_kinds.

    Raises:
        ConfigError: the allocator deals to other layers than are compressed.
    """
    settings = config.plan_settings_of(len(kinds))
    compressed = tuple(layer for layer, kind in enumerate(kinds) if kind == FULL_ATTENTION)
    shares = settings.shares
    if shares is None:
        return [(compressed, settings)]
    dealt = {layer for layers in shares.levels for layer in layers}
    if others := sorted(dealt.symmetric_difference(compressed)):
        layer = others[0]
        what = (
            f"it deals to layer {layer}, which is not compressed ({kinds[layer]})"
            if layer in dealt
            else f"it deals nothing to layer {layer}, which is compressed"
        )
        raise ConfigError(
            f"{KEY_PREFIX}allocator={config.allocator.name()!r} is not allowed: {what}; use "
            "allocator uniform, or a profile of this model."
        )
    return [(layers, replace(settings, level=level)) for level, layers in enumerate(shares.levels)]


def first_scored_query(levels: Iterable[LevelPlan], num_processed: int = 0) -> int | None:
    """Position of the first query that scores for the next compaction of the prompt.

    The same for all levels. None where none does: levels that keep the whole prompt need no scores
    of it.
    """
    return min(
        (
            level.plan.first_scored_query(num_processed)
            for level in levels
            if level.plan.compresses_prompt
        ),
        default=None,
    )


def scored_queries(levels: Iterable[LevelPlan], sample_stride: int) -> ScoredQueries | None:
    """The queries of a prompt that score; None for none."""
    first = first_scored_query(levels)
    return None if first is None else ScoredQueries(first, sample_stride)


def next_compaction(levels: Iterable[LevelPlan], num_processed: int) -> int | None:
    """Tokens processed when the next compaction of any level falls due; None for never."""
    due = (level.plan.next_compaction(num_processed) for level in levels)
    return min((at for at in due if at is not None), default=None)
