# SPDX-License-Identifier: Apache-2.0
"""Pretrained models that come as Python packages, made into folders that vLLM loads."""
