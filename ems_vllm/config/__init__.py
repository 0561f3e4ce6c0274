# SPDX-License-Identifier: Apache-2.0
"""Settings: what an operator or a request may ask for, and how a mistake is answered."""

from ems_vllm.config.errors import ConfigError
from ems_vllm.config.load import load_config, parse_overrides, settings_of
from ems_vllm.config.request import RequestOptions
from ems_vllm.config.schema import KVCompressionConfig

__all__ = [
    "ConfigError",
    "KVCompressionConfig",
    "RequestOptions",
    "load_config",
    "parse_overrides",
    "settings_of",
]
