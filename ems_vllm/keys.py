# SPDX-License-Identifier: Apache-2.0
"""Names shared by processes that must not import more than this."""

CONFIG_KEY = "kv_compression"
"""Key of the settings in VllmConfig.additional_config."""
