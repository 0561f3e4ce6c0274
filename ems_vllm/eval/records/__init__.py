# SPDX-License-Identifier: Apache-2.0
"""Records: what a run is told, what it leaves on disk, and how an answer is scored."""
