# SPDX-License-Identifier: Apache-2.0
"""The same budget everywhere."""

from ems_vllm.policies.base import ALLOCATORS, BudgetAllocator


@ALLOCATORS.register("uniform")
class UniformBudget(BudgetAllocator):
    """Every layer and every kv_head keeps the same number of entries (different ones)."""

    def shares(self, num_layers: int) -> None:
        return None
