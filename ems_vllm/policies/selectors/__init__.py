# SPDX-License-Identifier: Apache-2.0
"""Which entries stay."""
