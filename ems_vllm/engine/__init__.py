# SPDX-License-Identifier: Apache-2.0
"""Adapters to vLLM, by its own extension points; together with `patches`, all that imports it."""
