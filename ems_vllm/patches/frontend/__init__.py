# SPDX-License-Identifier: Apache-2.0
"""Patches of what runs in the API server, or in the program that makes an `LLM`."""
