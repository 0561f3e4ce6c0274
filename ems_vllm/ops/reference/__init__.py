# SPDX-License-Identifier: Apache-2.0
"""What every operator computes, in plain PyTorch: same signature, written to be read.

The functions run anywhere torch runs, in loops and in float32 or float64, and share no code with
the compiled kernels, which are tested against them.
"""

from ems_vllm.ops.assign_classes import assign_classes
from ems_vllm.ops.head_pages import head_pages
from ems_vllm.ops.merge_compact import merge_compact
from ems_vllm.ops.plan_metadata import plan_metadata
from ems_vllm.ops.record_queries import record_queries
from ems_vllm.ops.score_queries import score_queries
from ems_vllm.ops.score_window import score_window
from ems_vllm.ops.select_entries import select_entries

__all__ = [
    "assign_classes",
    "head_pages",
    "merge_compact",
    "plan_metadata",
    "record_queries",
    "score_queries",
    "score_window",
    "select_entries",
]
