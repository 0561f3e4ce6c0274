# SPDX-License-Identifier: Apache-2.0
"""RULER's metrics (arXiv 2404.06654): whether references occur in the answer, in any case."""

from __future__ import annotations

import itertools
import re
import string
from collections.abc import Sequence

_PUNCTUATION = string.punctuation + "\u2018\u2019\u201c\u201d\u2014"


def all_found(output: str, references: Sequence[str], choices: Sequence[str] = ()) -> float:
    """Share of the references that occur (`string_match_all`)."""
    answer = output.lower()
    return sum(reference.lower() in answer for reference in references) / len(references)


def any_found(output: str, references: Sequence[str], choices: Sequence[str] = ()) -> float:
    """Whether at least one of the references occurs (`string_match_part`)."""
    answer = output.lower()
    return float(any(reference.lower() in answer for reference in references))


def leading_words(output: str, references: Sequence[str], choices: Sequence[str] = ()) -> float:
    """Share of the reference's words that the answer begins with, in order; the best reference.

    Upper and lower case, and punctuation around a word, do not matter. Ours.
    """

    def share(reference: str) -> float:
        expected, found = _bare_words(reference), _bare_words(output)
        pairs = zip(expected, found, strict=False)
        same = itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)
        return len(list(same)) / max(len(expected), 1)

    return max((share(reference) for reference in references), default=0.0)


def _bare_words(text: str) -> list[str]:
    return [word for part in text.lower().split() if (word := part.strip(_PUNCTUATION))]


def first_number(output: str, references: Sequence[str], choices: Sequence[str] = ()) -> float:
    """Whether the first number of the answer is the reference (LongEval)."""
    found = re.search(r"\d+", output)
    return float(found is not None and found[0] in references)
