# SPDX-License-Identifier: Apache-2.0
"""How important an entry is; one method of the literature per file."""
