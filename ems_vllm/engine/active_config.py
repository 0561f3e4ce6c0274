# SPDX-License-Identifier: Apache-2.0
"""The compression settings that an engine runs with."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ems_vllm.config import KVCompressionConfig, load_config
from ems_vllm.keys import CONFIG_KEY

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def active_config(vllm_config: VllmConfig) -> KVCompressionConfig | None:
    """Settings carried by `vllm_config`, in any process of the engine; None when off."""
    return load_config((vllm_config.additional_config or {}).get(CONFIG_KEY))
