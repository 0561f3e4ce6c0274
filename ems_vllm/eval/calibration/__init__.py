# SPDX-License-Identifier: Apache-2.0
"""Measures what layers and heads of a model need, for what reads a profile."""
