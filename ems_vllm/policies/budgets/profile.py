# SPDX-License-Identifier: Apache-2.0
"""As much for each layer as it was found to need."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ems_vllm.layer_shares import LayerShares
from ems_vllm.policies.base import ALLOCATORS, BudgetAllocator
from ems_vllm.policies.levels import in_levels

_Ratio = Annotated[float, Field(gt=0, lt=1)]
_Fraction = Annotated[float, Field(ge=0, le=1)]
# What rounding in a file may leave of the mean.
_TOLERANCE = 0.005


class LayerProfile(BaseModel):
    """What the layers of a model need, at several budgets; `ems-vllm profile` measures it.

    Attributes:
        model: Whose, for people.
        ratios: Ascending: fractions of a prompt that layers keep on the mean.
        fractions: By index of a layer and ratio: the fraction that this layer needs then.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = ""
    ratios: Annotated[tuple[_Ratio, ...], Field(min_length=1)]
    fractions: Annotated[
        dict[Annotated[int, Field(ge=0)], tuple[_Fraction, ...]], Field(min_length=1)
    ]

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


@ALLOCATORS.register("profile")
class ProfileBudget(BudgetAllocator):
    """Gives each layer what it was found to need, whatever the prompt is (ours).

    By KVzip's scores (Kim et al. 2025, arXiv:2505.23416), which go by the attention that repeats a
    text, the same few layers get most of the entries of whatever text (measured on SmolLM2:
    docs/budgets.md). So that is measured once for a model (`ems-vllm profile`), and requests are
    served with the result.
    """

    profile: LayerProfile
    """What `ems-vllm profile` measured: the name of a profile that ships, the path of a YAML file,
    or its content."""

    uniform_share: Annotated[float, Field(ge=0, le=1)] = 0.4
    """Part of the budget that all layers share equally, as the safeguard of Ada-KV (Feng et al.
    2024, arXiv:2407.11550) does among heads."""

    num_levels: Annotated[int, Field(ge=1, le=64)] = 3
    """Block tables of a request: layers are dealt to in so many levels, or one by one where there
    are fewer."""

    def shares(self, num_layers: int) -> LayerShares:
        profile, equal = self.profile, self.uniform_share
        if max(profile.fractions) >= num_layers:
            raise ValueError(
                f"its profile has a layer {max(profile.fractions)}, but the model has {num_layers} "
                "layers, counted from 0; give a profile of this model, or measure one with "
                "`ems-vllm profile`"
            )
        fractions = {
            layer: [
                equal * ratio + (1 - equal) * fraction
                for ratio, fraction in zip(profile.ratios, of_layer, strict=True)
            ]
            for layer, of_layer in profile.fractions.items()
        }
        return in_levels(fractions, profile.ratios, self.num_levels)
