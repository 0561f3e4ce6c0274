# SPDX-License-Identifier: Apache-2.0
"""Patches of what runs in the workers."""
