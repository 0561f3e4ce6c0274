# SPDX-License-Identifier: Apache-2.0
"""Settings of the plan for each compressed layer of a worker."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING

from vllm.model_executor.models.utils import extract_layer_index

if TYPE_CHECKING:
    from ems_vllm.plan import PlanSettings


class LayersDiffer(ValueError):
    """An allocator deals to other layers than are compressed."""


def by_layer(
    settings: PlanSettings, names: Iterable[str], compressed: Collection[str]
) -> dict[str, PlanSettings]:
    """Settings of each compressed layer, by name.

    Args:
        settings: Of the server, with the shares of all layers of the model.
        names: Of the layers of this worker that have a KV cache.
        compressed: Those of them that are compressed.

    Raises:
        LayersDiffer: one of them has no share, or another layer has one. What that one does not
            keep, the others would have to, or the budget would not be what it says.
    """
    if settings.shares is None:
        return dict.fromkeys(compressed, settings)
    found = {}
    for name in names:
        try:
            of_layer = settings.for_layer(extract_layer_index(name))
        # Some models count layers in more than one number.
        except (KeyError, AssertionError):
            if name in compressed:
                raise LayersDiffer(f"nothing to {name}, which is compressed") from None
            continue
        if name not in compressed:
            raise LayersDiffer(f"a share to {name}, which is not compressed")
        found[name] = of_layer
    return found
