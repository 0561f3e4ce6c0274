# SPDX-License-Identifier: Apache-2.0
"""The four choices that make a policy, as narrow interfaces.

    Scorer            how important every entry of every kv_head is
    Allocator   how many entries are kept where
    Selector          in which order entries are kept
    Merger            what happens to the ones that do not stay

One method of the literature is one small class in one file; recipes in `configs/policies/`
compose them. Components are frozen pydantic models, so that their options are validated with the
rest of the settings. They see plain tensors only and run on any device, without vLLM.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from ems_vllm.ops import KeyMerge
from ems_vllm.policies.paper import Paper
from ems_vllm.registry import Registry

if TYPE_CHECKING:
    import torch

    from ems_vllm.head_shares import HeadShares
    from ems_vllm.layer_shares import LayerShares
    from ems_vllm.policies.context import CompactionContext


class Component(BaseModel):
    """A part of a policy; its fields are its options."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    registry: ClassVar[Registry]

    papers: ClassVar[tuple[Paper, ...]] = ()
    """Where it comes from; none where it is ours."""

    @classmethod
    def name(cls) -> str:
        """The name under which recipes know this class."""
        return next(name for name in cls.registry if cls.registry.get(name) is cls)


@dataclass(frozen=True)
class Scores:
    """Importance of the live entries of the requests that are compressed in this step.

    Attributes:
        weights: [num_layers, num_rows, num_kv_heads, max_entries], float32, >= 0 - higher is kept.
            Entries beyond a row's length are 0.
        carry: same shape, or None - the accumulated score to store with the kept entries, so that
            the next compression of the request can go on from it.
        mass: same shape, or None for the weights - weight of an entry in a merge.
    """

    weights: torch.Tensor
    carry: torch.Tensor | None = None
    mass: torch.Tensor | None = None

    @property
    def compared(self) -> torch.Tensor:
        """What kv_heads are compared by.

        Weights may be ranks within a head, like those of `ems`: the same in all heads, they say
        nothing about them. So where there is a `mass`, which is attention, it is that.
        """
        return self.weights if self.mass is None else self.mass


@dataclass(frozen=True)
class Selection:
    """Which entries stay.

    Attributes:
        kept_idx: [num_layers, num_rows, num_kv_heads, max_budget], int32 - ascending, -1 = none.
        merge_idx: [num_layers, num_rows, num_kv_heads, max_candidates], int32 - best first,
            -1 = none.
    """

    kept_idx: torch.Tensor
    merge_idx: torch.Tensor


@dataclass(frozen=True)
class Classes:
    """What becomes of the candidates for merging.

    Attributes:
        class_idx: shape of Selection.merge_idx, int32 - rank of the kept entry that takes the
            candidate, or the row's budget: the zero class, which is dropped.
        weights: Like Scores.weights, or None for the attention that entries received - weight of
            an entry in its class.
    """

    class_idx: torch.Tensor
    weights: torch.Tensor | None = None


class Scorer(Component):
    """Scores entries; every score is >= 0 and higher means keep."""

    registry: ClassVar[Registry] = Registry("scorer")

    @property
    def uses_accumulated(self) -> bool:
        """Whether attention of all prompt queries is accumulated during prefill."""
        return False

    @property
    def uses_window(self) -> bool:
        """Whether the queries of the last `obs_window` tokens are recorded."""
        return False

    @property
    def across_heads(self) -> bool:
        """Whether the score of an entry is that of a layer, the same for all its kv_heads."""
        return False

    @property
    def reads_queries(self) -> bool:
        """Whether a score depends on queries."""
        return self.uses_accumulated or self.uses_window

    @property
    def reads_profile(self) -> bool:
        """Whether it depends on what was measured of a model."""
        return False

    def missing(self, layers: list[int], num_heads: int) -> str | None:
        """What a profile lacks for some layers of a model; None for nothing.

        Args:
            layers: Their indices in the model.
            num_heads: Query heads of each, on all ranks.
        """
        return None

    @property
    def num_score_tensors(self) -> int:
        """Float32 tensors of the shape of a score that `score` holds at a time, at most.

        What it returns is among them, an int64 tensor counts as two.
        """
        return 8

    @property
    def scratch_bytes(self) -> int:
        """Bytes that `score` holds beside them, whatever the number of entries."""
        return 0

    @abstractmethod
    def score(self, context: CompactionContext) -> Scores:
        """Score the live entries of every row of `context`."""


class Allocator(Component):
    """Deals the server's budget to the layers, and what a layer keeps to its kv_heads."""

    registry: ClassVar[Registry] = Registry("allocator")

    @abstractmethod
    def shares(self, num_layers: int) -> LayerShares | None:
        """How the layers share a budget; None where all have the same.

        Layers of different levels end up in different KV-cache groups, each with its own block
        table, because the settings of the plan are part of a layer's KV-cache spec.

        Args:
            num_layers: Of the model.

        Raises:
            ValueError: a model of so many layers is not dealt to; settings name the key.
        """

    def head_shares(self) -> Mapping[int, HeadShares] | None:
        """By layer, how its kv_heads share what it keeps, whatever the prompt; None for nothing."""
        return None

    @property
    def deals_to_layers(self) -> bool:
        """Whether layers may keep different numbers of entries."""
        return False

    @property
    def reads_profile(self) -> bool:
        """Whether it depends on what was measured of a model."""
        return False

    @property
    def deals_by_scores(self) -> bool:
        """Whether each compaction deals what a layer keeps to its kv_heads; see `deal`."""
        return False

    @property
    def deals_to_heads(self) -> bool:
        """Whether the kv_heads of a layer may keep different numbers of entries."""
        return self.deals_by_scores or self.head_shares() is not None

    def deal(
        self, context: CompactionContext, scores: Scores, budgets: Sequence[int]
    ) -> torch.Tensor:
        """Deal what a layer keeps to its kv_heads, once their entries have scores.

        Only of allocators with `deals_by_scores`. Costs a synchronisation with the device.

        Args:
            context: Of one layer; `rows_together` rows are the kv_heads of a request. Where kept
                entries go is not yet said.
            scores: Of its entries.
            budgets: Entries, by request, that each head would keep if all kept as many; whole
                blocks.

        Returns:
            [num_requests, rows_together], int64, on the host: pages (block_size entries) of each
            head, as many for a request as equal heads would have. All protected entries have room,
            and no head has more pages than its entries fill.
        """
        raise NotImplementedError


class Selector(Component):
    """Orders entries by their scores: the first ones stay, the next ones may be merged.

    Entries keep their places among each other, so the sinks stay the first ones of every later
    compression.
    """

    registry: ClassVar[Registry] = Registry("selector")

    num_sink_tokens: Annotated[int, Field(ge=0)] = 4
    """First tokens of the prompt that are never dropped and never merged into."""

    @property
    def across_heads(self) -> bool:
        """Whether all kv_heads of a layer have the same order."""
        return False

    @property
    def follows_scores(self) -> bool:
        """Whether kv_heads with the same scores have the same order."""
        return True

    @property
    def reads_output_weights(self) -> bool:
        """Whether the order depends on the output projections of the layers."""
        return False

    @property
    def goes_by_budget(self) -> bool:
        """Whether the order depends on how many entries stay."""
        return False

    @property
    def num_rank_tensors(self) -> int:
        """Float32 tensors of the shape of a score that `rank` holds beside the scores, at most."""
        return 0

    @property
    def scratch_bytes(self) -> int:
        """Bytes that `rank` holds beside them, whatever the number of entries."""
        return 0

    @abstractmethod
    def rank(self, context: CompactionContext, scores: Scores) -> torch.Tensor:
        """By what entries are selected: `context.budgets` of each kv_head, the highest.

        Returns:
            Like Scores.weights, which may be returned as they are.
        """


class Merger(Component):
    """Folds entries that do not stay into entries that do."""

    registry: ClassVar[Registry] = Registry("merger")

    @property
    def candidates_per_center(self) -> int | None:
        """Bound of the merge candidates, as a multiple of the budget; None for all there are."""
        return 0

    @property
    def key_merge(self) -> KeyMerge:
        """What keys of classes are made of; values are always merged."""
        return KeyMerge.CENTRE

    @property
    def sums_values(self) -> bool:
        """Whether values of members are added to the centre's, instead of averaged with it."""
        return False

    @property
    def num_merge_tensors(self) -> int:
        """Tensors of 4 bytes for each score that `classify` holds, at most; class_idx is one."""
        return 1

    @property
    def scratch_bytes(self) -> int:
        """Bytes that `classify` holds beside them, whatever the number of entries."""
        return 0

    @property
    def keeps_mass(self) -> bool:
        """Whether a class receives the attention of all its entries; needs recorded queries."""
        return False

    @property
    def mass_limit(self) -> float:
        """Candidates lie within this fraction of a head's cumulative score."""
        return 1.0

    @abstractmethod
    def classify(self, context: CompactionContext, scores: Scores, selection: Selection) -> Classes:
        """Assign every candidate to a class."""


SCORERS: Registry[Scorer] = Scorer.registry
ALLOCATORS: Registry[Allocator] = Allocator.registry
SELECTORS: Registry[Selector] = Selector.registry
MERGERS: Registry[Merger] = Merger.registry
