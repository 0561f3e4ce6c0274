# SPDX-License-Identifier: Apache-2.0
"""How the servers of an evaluation are set up."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from ems_vllm.eval.records.budget import largest_kv_budget

Count = Annotated[int, Field(ge=1)]


class ServerSettings(BaseModel):
    """How servers are started, all of them alike.

    Attributes:
        recent_window, obs_window, recompress_interval: As in KVCompressionConfig. Small windows by
            default, so that 2 % of 4,096 tokens have room for more than the window.
        block_size: Of vLLM.
        args: Further arguments of `vllm serve`.
        compression: Further settings of KVCompressionConfig, for every recipe.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    recent_window: Count = 16
    obs_window: Count = 16
    recompress_interval: Annotated[int, Field(ge=0)] = 256
    block_size: Count = 16
    args: tuple[str, ...] = ()
    compression: dict[str, Any] = {}

    def recipe_overrides(self, total: int) -> dict[str, Any]:
        """Settings beside the recipe of a server whose requests hold at most `total` entries."""
        return {
            "budget": largest_kv_budget(total, self.recent_window, self.block_size),
            "recent_window": self.recent_window,
            "obs_window": self.obs_window,
            "recompress_interval": self.recompress_interval,
            # Otherwise a prompt just above its budget would be kept whole.
            "min_blocks_saved": 1,
            **self.compression,
        }
