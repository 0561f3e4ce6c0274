# SPDX-License-Identifier: Apache-2.0
"""As much for each layer as it was found to need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated

from pydantic import Field, model_validator

from ems_vllm.head_shares import HeadShares
from ems_vllm.layer_shares import LayerShares
from ems_vllm.policies.base import ALLOCATORS, Allocator
from ems_vllm.policies.levels import in_levels
from ems_vllm.policies.model_profile import LayerProfile
from ems_vllm.policies.paper import Paper

# Chosen on prompts that nothing else is measured on (ours).
_UNIFORM_SHARE, _UNIFORM_SHARE_PER_HEAD = 0.4, 0.2


@ALLOCATORS.register("profile")
class ProfileAllocator(Allocator):
    """Gives each layer what it was found to need, whatever the prompt is (ours).

    By KVzip's scores (Kim et al. 2025, arXiv:2505.23416), which go by the attention that repeats a
    text, the same few layers get most of the entries of whatever text (measured on SmolLM2:
    docs/budgets.md). So that is measured once for a model (`ems-vllm calibrate`), and requests are
    served with the result.
    """

    papers = (Paper("KVzip", "Kim et al.", 2025, "2505.23416"),)

    profile: LayerProfile
    """What `ems-vllm calibrate` measured: the name of a profile that ships, the path of a YAML
    file, or its content."""

    uniform_share: Annotated[float, Field(ge=0, le=1)] | None = None
    """Part of the budget that all layers, and with per_head all kv_heads, share equally, as the
    safeguard of Ada-KV (Feng et al. 2024, arXiv:2407.11550) does among heads; None for 0.4, or 0.2
    with per_head."""

    num_levels: Annotated[int, Field(ge=1, le=64)] = 3
    """Block tables of a request: layers are dealt to in so many levels, or one by one where there
    are fewer."""

    per_head: bool = False
    """Deal what a layer keeps to its kv_heads by the profile, too, in whole pages (a page: the
    slots of one kv_head in one block)."""

    @model_validator(mode="after")
    def _has_heads(self) -> ProfileAllocator:
        if self.per_head and self.profile.head_fractions is None:
            raise ValueError(
                "per_head=True is not allowed: its profile says nothing of kv_heads; measure one "
                "with `ems-vllm calibrate`, or set it to false"
            )
        return self

    def head_shares(self) -> Mapping[int, HeadShares] | None:
        if not self.per_head:
            return None
        assert self.profile.head_fractions is not None
        return {
            layer: HeadShares(self.profile.ratios, tuple(map(self._mixed, of_heads)))
            for layer, of_heads in self.profile.head_fractions.items()
        }

    def _mixed(self, fractions: Sequence[float]) -> tuple[float, ...]:
        """By ratio: a part of the budget is shared equally, the rest as it is needed."""
        equal = self.uniform_share
        if equal is None:
            equal = _UNIFORM_SHARE_PER_HEAD if self.per_head else _UNIFORM_SHARE
        return tuple(
            equal * ratio + (1 - equal) * fraction
            for ratio, fraction in zip(self.profile.ratios, fractions, strict=True)
        )

    @property
    def deals_to_layers(self) -> bool:
        return True

    @property
    def reads_profile(self) -> bool:
        return True

    def shares(self, num_layers: int) -> LayerShares:
        profile = self.profile
        if max(profile.fractions) >= num_layers:
            raise ValueError(
                f"its profile has a layer {max(profile.fractions)}, but the model has {num_layers} "
                "layers, counted from 0; give a profile of this model, or measure one with "
                "`ems-vllm calibrate`"
            )
        fractions = {layer: self._mixed(needed) for layer, needed in profile.fractions.items()}
        return in_levels(fractions, profile.ratios, self.num_levels)
