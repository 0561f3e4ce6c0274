# SPDX-License-Identifier: Apache-2.0
"""What was measured of a model's layers and heads."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, model_validator

_Ratio = Annotated[float, Field(gt=0, lt=1)]
_Fraction = Annotated[float, Field(ge=0, le=1)]
# What rounding in a file may leave of the mean.
_TOLERANCE = 0.005


class LayerProfile(BaseModel):
    """What the layers of a model need, at several budgets; `ems-vllm calibrate` measures it.

    Attributes:
        model: Whose, and by what it was measured, for people.
        ratios: Ascending: fractions of a prompt that layers keep on the mean.
        fractions: By index of a layer and ratio: the fraction that this layer needs then.
        head_fractions: By index of a layer, kv_head and ratio: the same of its heads; None where
            that was not measured.
        query_heads: By index of a layer: its query heads, the best first; None where none is.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = ""
    by: str = ""
    ratios: Annotated[tuple[_Ratio, ...], Field(min_length=1)]
    fractions: Annotated[
        dict[Annotated[int, Field(ge=0)], tuple[_Fraction, ...]], Field(min_length=1)
    ]
    head_fractions: dict[int, tuple[tuple[_Fraction, ...], ...]] | None = None
    query_heads: dict[int, tuple[Annotated[int, Field(ge=0)], ...]] | None = None

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
