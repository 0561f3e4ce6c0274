# SPDX-License-Identifier: Apache-2.0
"""Metrics by name: from an answer and its references to a quality in [0, 1]."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ems_vllm.eval.metrics import string_match

# (output, references, choices) -> quality in [0, 1].
Metric = Callable[[str, Sequence[str], Sequence[str]], float]

METRICS: dict[str, Metric] = {
    "string_match_all": string_match.all_found,
    "string_match_part": string_match.any_found,
}
