# SPDX-License-Identifier: Apache-2.0
"""The status page: routes that vLLM attaches where VLLM_PLUGINS names `ems_status`."""
