# SPDX-License-Identifier: Apache-2.0
"""Fake implementations: every operator mutates its outputs in place and returns nothing."""

import torch

OPERATORS = (
    "score_queries",
    "score_window",
    "record_queries",
    "select_entries",
    "assign_classes",
    "merge_compact",
    "plan_metadata",
    "head_pages",
)


def _mutates_only(*args: object) -> None:
    """Nothing to infer: no operator returns a tensor."""


def register() -> None:
    """Give every operator its fake implementation; the library must be loaded."""
    for name in OPERATORS:
        torch.library.register_fake(f"ems_vllm::{name}", _mutates_only)
