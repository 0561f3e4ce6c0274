# SPDX-License-Identifier: Apache-2.0
"""The KV-cache spec of a compressed layer; importing it registers spec and manager with vLLM.

Workers build the spec and the engine core unpickles it, so the registration happens in exactly
the processes that need it, and only when compression is on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec, replace_as
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from ems_vllm.engine.observation import ObservationSettings
from ems_vllm.engine.scheduler.kv_cache_manager import CompressedAttentionManager
from ems_vllm.plan import PlanSettings

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from ems_vllm.engine.scheduler.group_spec import GroupSpec

_OWN_FIELDS = ("settings", "observation")


@dataclass(frozen=True, kw_only=True)
class CompressedAttentionSpec(FullAttentionSpec):
    """Full attention whose old columns are compressed and given back.

    Attributes:
        settings: From which the scheduler makes each request's plan.
        observation: What workers keep of the queries.
    """

    settings: PlanSettings
    observation: ObservationSettings

    @classmethod
    def compress(
        cls, spec: FullAttentionSpec, settings: PlanSettings, observation: ObservationSettings
    ) -> Self:
        """`spec` with compression; layout and page size are unchanged."""
        return replace_as(spec, cls, settings=settings, observation=observation)

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        dense = super().max_memory_usage_bytes(vllm_config)
        max_model_len = vllm_config.model_config.max_model_len
        columns = self.settings.most_columns(self.block_size, max_model_len)
        return dense if columns is None else min(dense, columns * self.page_size_bytes)

    @property
    def num_score_pages(self) -> int:
        """Private score pages of a layer, behind those of the blocks."""
        return self.observation.num_score_pages(self.block_size)

    @property
    def score_page_bytes(self) -> int:
        """Bytes of the float32 scores of one block; 0 where none are accumulated."""
        if self.observation.score_tokens is None:
            return 0
        return 4 * self.num_kv_heads * self.block_size

    def num_ring_rows(self, num_blocks: int, max_num_seqs: int) -> int:
        """Rows of the query ring in a cache of `num_blocks` blocks."""
        return self.observation.num_ring_rows(
            self.settings, self.block_size, num_blocks, max_num_seqs
        )

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, KVCacheSpec]) -> bool:
        # Layers of different sizes get groups of their own: a plan depends on the block size, and
        # the score pages of a group are all alike. (A mixture with plain full attention is let
        # through, noticed by layer_choice.mixed_layer, and refused where there are words for it.)
        if all(isinstance(spec, CompressedAttentionSpec) for spec in kv_cache_specs.values()):
            return all(spec == self for spec in kv_cache_specs.values())
        return super().is_uniform_with_collection(kv_cache_specs)

    @classmethod
    def merge(cls, specs: Sequence[Self]) -> Self:
        # vLLM tries to merge any two specs, and takes an AssertionError for a no.
        assert all(isinstance(spec, cls) for spec in specs), (
            "Compressed layers share no KV-cache group with others."
        )
        own = {name: {getattr(spec, name) for spec in specs} for name in _OWN_FIELDS}
        assert all(len(values) == 1 for values in own.values()), (
            "Layers of one KV-cache group must be compressed alike."
        )
        plain = [replace_as(spec, FullAttentionSpec, drop=_OWN_FIELDS) for spec in specs]
        merged = FullAttentionSpec.merge(plain)
        return replace_as(merged, cls, **{name: values.pop() for name, values in own.items()})


# Without this, a first registration of ours would keep vLLM from registering its own specs.
KVCacheSpecRegistry._ensure_registered()
KVCacheSpecRegistry.register(
    CompressedAttentionSpec, CompressedAttentionManager, uniform_type_base_spec=FullAttentionSpec
)

if TYPE_CHECKING:
    _AS_READ_BY_THE_SCHEDULER: type[GroupSpec] = CompressedAttentionSpec
