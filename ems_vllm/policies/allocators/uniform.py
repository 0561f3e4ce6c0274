# SPDX-License-Identifier: Apache-2.0
"""The same budget everywhere."""

from ems_vllm.policies.base import ALLOCATORS, Allocator


@ALLOCATORS.register("uniform")
class UniformAllocator(Allocator):
    """Every layer and every kv_head keeps the same number of entries (different ones)."""

    def shares(self, num_layers: int) -> None:
        return None
