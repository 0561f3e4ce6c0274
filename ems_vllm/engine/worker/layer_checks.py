# SPDX-License-Identifier: Apache-2.0
"""What the layers of a compressed group must have in common, and their attention be able to do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ems_vllm.engine.attention import OVERRIDES, observable_backend
from ems_vllm.engine.worker.refusals import (
    MIXED_QUERY_HEADS,
    MIXED_SCALES,
    OTHER_PROFILE,
    UNKNOWN_BACKEND,
)

if TYPE_CHECKING:
    from ems_vllm.policies.base import Scorer


def check_backends(layers: Mapping[str, Any], names: Sequence[str], recipe: str) -> None:
    """Refuse a backend that was not wrapped.

    Args:
        layers: vLLM's attention layers by name.
        names: Those of the group.
        recipe: In use.

    Raises:
        ConfigError: with what to choose instead.
    """
    for name in names:
        if not hasattr(layers[name].impl, "compression"):
            backend = layers[name].attn_backend.get_name()
            raise UNKNOWN_BACKEND.error(
                backend, recipe, known=", ".join(OVERRIDES), choice=observable_backend(backend)
            )


def common_scale(
    layers: Mapping[str, Any], owners: Sequence[str], model: str, recipe: str
) -> float:
    """The softmax scale of a group.

    Args:
        layers, recipe: As above.
        owners: Layers of the group that have a cache of their own.
        model: As the operator named it.

    Raises:
        ConfigError: there are several.
    """
    scales = {float(layers[name].impl.scale) for name in owners}
    if len(scales) > 1:
        raise MIXED_SCALES.error(model, recipe, scales=sorted(scales))
    return scales.pop()


def check_query_heads(
    layers: Mapping[str, Any], owners: Sequence[str], scorer: Scorer, model: str, recipe: str
) -> None:
    """Refuse different numbers of query heads where their queries are recorded together.

    Raises:
        ConfigError: with the numbers.
    """
    heads = {layers[name].num_heads for name in owners}
    if len(heads) > 1 and scorer.uses_window:
        raise MIXED_QUERY_HEADS.error(model, recipe, heads=sorted(heads))


def check_profile(layer_ids: list[int], num_heads: int, scorer: Scorer, recipe: str) -> None:
    """Refuse a scorer whose profile is of another model.

    Args:
        layer_ids: Of the group.
        num_heads: Query heads of a layer, all ranks together.

    Raises:
        ConfigError: with what does not fit.
    """
    reason = scorer.missing(layer_ids, num_heads)
    if reason is not None:
        raise OTHER_PROFILE.error(scorer.name(), recipe, reason=reason)
