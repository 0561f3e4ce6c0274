# SPDX-License-Identifier: Apache-2.0
"""Patches of vLLM, for what it has no extension point for; one file per patched class."""
