# SPDX-License-Identifier: Apache-2.0
"""Names shared by processes that must not import more than this."""

CONFIG_KEY = "kv_compression"
"""Key of the settings in VllmConfig.additional_config."""

KEY_PREFIX = "kv_compression_config."
"""What names of settings begin with in messages: the option that sets them."""

STATUS_PLUGIN = "ems_status"
"""Name of the status page among vLLM's endpoint plugins."""
LONGEST_NAME = 512
"""Characters of a request's name, which a client may give: of longer ones nothing is remembered."""
