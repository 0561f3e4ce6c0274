# SPDX-License-Identifier: Apache-2.0
"""Patches of vLLM, where it has no extension point: one file per class, by process."""
