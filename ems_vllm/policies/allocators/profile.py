# SPDX-License-Identifier: Apache-2.0
"""As much for each layer as it was found to need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ems_vllm.head_shares import HeadShares
from ems_vllm.layer_shares import LayerShares
from ems_vllm.policies.base import ALLOCATORS, Allocator
from ems_vllm.policies.levels import in_levels
from ems_vllm.policies.paper import Paper

_Ratio = Annotated[float, Field(gt=0, lt=1)]
_Fraction = Annotated[float, Field(ge=0, le=1)]
# What rounding in a file may leave of the mean.
_TOLERANCE = 0.005
# Chosen on prompts that nothing else is measured on (ours).
_UNIFORM_SHARE, _UNIFORM_SHARE_PER_HEAD = 0.4, 0.2


class LayerProfile(BaseModel):
    """What the layers of a model need, at several budgets; `ems-vllm profile` measures it.

    Attributes:
        model: Whose, for people.
        ratios: Ascending: fractions of a prompt that layers keep on the mean.
        fractions: By index of a layer and ratio: the fraction that this layer needs then.
        head_fractions: By index of a layer, kv_head and ratio: the same of its heads; None where
            that was not measured.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = ""
    ratios: Annotated[tuple[_Ratio, ...], Field(min_length=1)]
    fractions: Annotated[
        dict[Annotated[int, Field(ge=0)], tuple[_Fraction, ...]], Field(min_length=1)
    ]
    head_fractions: dict[int, tuple[tuple[_Fraction, ...], ...]] | None = None

    @model_validator(mode="after")
    def _is_consistent(self) -> LayerProfile:
        if any(low >= high for low, high in pairwise(self.ratios)):
            raise ValueError(f"ratios {list(self.ratios)} do not ascend; put them in order")
        for layer, fractions in self.fractions.items():
            if len(fractions) != len(self.ratios):
                raise ValueError(
                    f"layer {layer} has {len(fractions)} fractions for {len(self.ratios)} ratios; "
                    "give one for each"
                )
            if any(low > high for low, high in pairwise(fractions)):
                raise ValueError(
                    f"layer {layer} keeps less of a prompt at a larger ratio; measure the profile "
                    "again"
                )
        for at, ratio in enumerate(self.ratios):
            mean = sum(of_layer[at] for of_layer in self.fractions.values()) / len(self.fractions)
            if abs(mean - ratio) > _TOLERANCE:
                raise ValueError(
                    f"at the ratio {ratio} the layers keep {mean:.4f} of a prompt on the mean; the "
                    "two must be equal, so measure the profile again"
                )
        return self

    @model_validator(mode="after")
    def _heads_are_consistent(self) -> LayerProfile:
        if self.head_fractions is None:
            return self
        if self.head_fractions.keys() != self.fractions.keys():
            raise ValueError("head_fractions names other layers than fractions; measure it again")
        if len({len(of_layer) for of_layer in self.head_fractions.values()}) != 1:
            raise ValueError(
                "head_fractions has more heads in one layer than in another; measure it again"
            )
        for layer, of_layer in self.head_fractions.items():
            self._check_heads(layer, of_layer)
        return self

    def _check_heads(self, layer: int, of_layer: Sequence[Sequence[float]]) -> None:
        if not of_layer or any(len(of_head) != len(self.ratios) for of_head in of_layer):
            raise ValueError(
                f"head_fractions of layer {layer} must have {len(self.ratios)} fractions for each "
                "kv_head, one for each ratio; measure it again"
            )
        for at, of_heads in enumerate(zip(*of_layer, strict=True)):
            if abs(sum(of_heads) / len(of_heads) - self.fractions[layer][at]) > _TOLERANCE:
                raise ValueError(
                    f"at the ratio {self.ratios[at]} the kv_heads of layer {layer} do not keep "
                    "what the layer does, on the mean; measure it again"
                )
        if any(low > high for of_head in of_layer for low, high in pairwise(of_head)):
            raise ValueError(
                f"a kv_head of layer {layer} keeps less of a prompt at a larger ratio; measure it "
                "again"
            )


@ALLOCATORS.register("profile")
class ProfileAllocator(Allocator):
    """Gives each layer what it was found to need, whatever the prompt is (ours).

    By KVzip's scores (Kim et al. 2025, arXiv:2505.23416), which go by the attention that repeats a
    text, the same few layers get most of the entries of whatever text (measured on SmolLM2:
    docs/budgets.md). So that is measured once for a model (`ems-vllm profile`), and requests are
    served with the result.
    """

    papers = (Paper("KVzip", "Kim et al.", 2025, "2505.23416"),)

    profile: LayerProfile
    """What `ems-vllm profile` measured: the name of a profile that ships, the path of a YAML file,
    or its content."""

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
                "with `ems-vllm profile`, or set it to false"
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

    def shares(self, num_layers: int) -> LayerShares:
        profile = self.profile
        if max(profile.fractions) >= num_layers:
            raise ValueError(
                f"its profile has a layer {max(profile.fractions)}, but the model has {num_layers} "
                "layers, counted from 0; give a profile of this model, or measure one with "
                "`ems-vllm profile`"
            )
        fractions = {layer: self._mixed(needed) for layer, needed in profile.fractions.items()}
        return in_levels(fractions, profile.ratios, self.num_levels)
