# SPDX-License-Identifier: Apache-2.0
"""LongBench's metrics (arXiv 2308.14508): the best over all references of a similarity."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

Similarity = Callable[[str, str, Sequence[str]], float]


def best(similarity: Similarity) -> Callable[[str, Sequence[str], Sequence[str]], float]:
    """A metric from a similarity to one reference."""

    def metric(output: str, references: Sequence[str], choices: Sequence[str] = ()) -> float:
        return max((similarity(output, r, choices) for r in references), default=0.0)

    return metric


def first_line(metric: Callable[..., float]) -> Callable[..., float]:
    """The same metric of the answer's first line, for tasks whose examples end with one."""

    def of_first_line(output: str, references: Sequence[str], choices: Sequence[str] = ()) -> float:
        return metric(output.lstrip("\n").split("\n")[0], references, choices)

    return of_first_line


def token_f1(output: str, reference: str, choices: Sequence[str] = ()) -> float:
    """F1 of the words in common, articles and punctuation aside (as for SQuAD)."""
    found, expected = Counter(_words(output)), Counter(_words(reference))
    common = (found & expected).total()
    if common == 0:
        return 0.0
    precision, recall = common / found.total(), common / expected.total()
    return 2 * precision * recall / (precision + recall)


def rouge_l(output: str, reference: str, choices: Sequence[str] = ()) -> float:
    """F1 of the longest common subsequence, by the package that LongBench uses."""
    # Imported here: an optional dependency.
    try:
        from rouge import Rouge
    except ModuleNotFoundError:
        from ems_vllm.config.errors import ConfigError

        raise ConfigError(
            "tasks that summarize need the package rouge: pip install 'ems-vllm[eval]'."
        ) from None
    try:
        return float(Rouge().get_scores([output], [reference], avg=True)["rouge-l"]["f"])
    # What it cannot compare (an answer without a word) counts nothing, as in LongBench.
    except (ValueError, RecursionError):
        return 0.0


def classification(output: str, reference: str, choices: Sequence[str]) -> float:
    """1 over the number of classes that the answer names, if the right one is among them.

    A class whose name is part of the right one's does not count.
    """
    named = [
        choice
        for choice in choices
        if choice in output and not (choice in reference and choice != reference)
    ]
    return 1 / len(named) if reference in named else 0.0


def retrieval(output: str, reference: str, choices: Sequence[str] = ()) -> float:
    """Share of the answer's numbers that are the paragraph's."""
    expected = re.search(r"Paragraph (\d+)", reference)
    return count(output, expected[1] if expected else reference)


def count(output: str, reference: str, choices: Sequence[str] = ()) -> float:
    """Share of the answer's numbers that are the right one."""
    numbers = re.findall(r"\d+", output)
    return numbers.count(reference) / len(numbers) if numbers else 0.0


def code_similarity(output: str, reference: str, choices: Sequence[str] = ()) -> float:
    """Similarity of the first line that is code, in steps of a hundredth.

    2 * (characters of the longest common subsequence) / (characters of both), which is what
    fuzzywuzzy's `ratio` is.
    """
    lines = output.lstrip("\n").split("\n")
    line = next((x for x in lines if not any(mark in x for mark in ("`", "#", "//"))), "")
    total = len(line) + len(reference)
    if not line or not reference:
        return 0.0
    return round(200 * _common_subsequence(line, reference) / total) / 100


def _words(text: str) -> list[str]:
    kept = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", kept).split()


def _common_subsequence(a: str, b: str) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(b) + 1)
    for x in a:
        diagonal = 0
        for j, y in enumerate(b, start=1):
            above = row[j]
            row[j] = diagonal + 1 if x == y else max(row[j], row[j - 1])
            diagonal = above
    return row[-1]
