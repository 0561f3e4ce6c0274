# SPDX-License-Identifier: Apache-2.0
"""What is kept free beside the cache, by arithmetic."""

import pytest
import torch
from vllm.v1.kv_cache_interface import FullAttentionSpec

from ems_vllm.config import load_config, recipes
from ems_vllm.engine.kv_cache_spec import CompressedAttentionSpec
from ems_vllm.engine.memory import KERNEL_SCRATCH_BYTES, Footprint
from ems_vllm.policies.policy import Policy


def workspace(recipe: str, max_model_len: int, num_kv_heads: int = 8) -> int:
    """Bytes kept free for compactions; a ring of no row and no private pages add nothing."""
    config = load_config({"recipe": recipe, "budget": 1024, "workspace_mib": 64})
    policy = Policy.from_config(config)
    plain = FullAttentionSpec(
        block_size=16, num_kv_heads=num_kv_heads, head_size=128, dtype=torch.bfloat16
    )
    pages = 0 if policy.scorer.uses_global else None
    settings = policy.allocator.settings(config.plan_settings)
    specs = {"layer": CompressedAttentionSpec.compress(plain, settings, pages)}
    footprint = Footprint(config, policy, max_model_len, 0, 2, {"layer": 4 * num_kv_heads})
    return footprint.fixed_bytes(specs) - KERNEL_SCRATCH_BYTES


@pytest.mark.parametrize("recipe", recipes.names())
def test_the_workspace_has_room_for_a_layer_of_the_longest_request(recipe):
    policy = Policy.from_config(load_config(recipe))
    assert workspace(recipe, 32_768) == 64 << 20
    assert workspace(recipe, 1 << 20) == policy.workspace_bytes(1 << 20, 8) > 64 << 20
    # Tensor parallelism: a rank has a share of the kv_heads.
    assert workspace(recipe, 131_072, num_kv_heads=1) == 64 << 20
