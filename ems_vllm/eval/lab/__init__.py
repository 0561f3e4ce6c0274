# SPDX-License-Identifier: Apache-2.0
"""Ablations: dozens of variants of a recipe on the same processed prompts."""
