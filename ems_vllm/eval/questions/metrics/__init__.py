# SPDX-License-Identifier: Apache-2.0
"""Metrics by name: from an answer and its references to a quality in [0, 1]."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ems_vllm.eval.questions.metrics import longbench, string_match

# (output, references, choices) -> quality in [0, 1].
Metric = Callable[[str, Sequence[str], Sequence[str]], float]

METRICS: dict[str, Metric] = {
    "string_match_all": string_match.all_found,
    "string_match_part": string_match.any_found,
    "leading_words": string_match.leading_words,
    "first_number": string_match.first_number,
    "token_f1": longbench.best(longbench.token_f1),
    "token_f1_first_line": longbench.first_line(longbench.best(longbench.token_f1)),
    "rouge_l": longbench.best(longbench.rouge_l),
    "rouge_l_first_line": longbench.first_line(longbench.best(longbench.rouge_l)),
    "classification_first_line": longbench.first_line(longbench.best(longbench.classification)),
    "retrieval": longbench.best(longbench.retrieval),
    "count": longbench.best(longbench.count),
    "code_similarity": longbench.best(longbench.code_similarity),
}
