# SPDX-License-Identifier: Apache-2.0
"""What a calibration measures, sample by sample, and what it makes of that."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ems_vllm.policies.paper import Paper

if TYPE_CHECKING:
    import torch

    from ems_vllm.eval.transformers_engine.engine import TransformersEngine

# Token ids.
Sample = list[int]


@dataclass(frozen=True)
class Calibration:
    """What is written into a profile.

    Attributes:
        fractions: By layer and ratio: the fraction of a prompt that the layer should keep.
        head_fractions: By layer, kv_head and ratio; None where heads of a layer are alike.
        query_heads: By layer: its query heads, the best first; None where none is better.
        shown: [num_layers, heads], for a picture.
        what: Of the picture.
    """

    fractions: list[list[float]]
    head_fractions: list[list[list[float]]] | None
    query_heads: list[list[int]] | None
    shown: torch.Tensor
    what: str


class Measure(ABC):
    """One way to find out.

    Attributes:
        paper: Whose.
        samples: What the model is shown, one after the other.
    """

    paper: ClassVar[Paper]

    def __init__(self, samples: Sequence[Any]) -> None:
        self.samples = samples

    @abstractmethod
    def of_sample(self, engine: TransformersEngine, sample: Any) -> torch.Tensor | None:
        """What a sample shows, on the host; None where the model does not answer it."""

    @abstractmethod
    def result(self, found: Sequence[torch.Tensor], ratios: Sequence[float]) -> Calibration:
        """What all samples show; at least one."""
