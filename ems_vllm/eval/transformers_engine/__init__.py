# SPDX-License-Identifier: Apache-2.0
"""Answers without vLLM: what other engines on transformers share, and one of our own."""
