# SPDX-License-Identifier: Apache-2.0
"""Measures what the layers of a model need of a text, for the allocator `profile`."""
