# SPDX-License-Identifier: Apache-2.0
"""RULER's metrics (arXiv 2404.06654): whether references occur in the answer, in any case."""

from __future__ import annotations

import re
from collections.abc import Sequence


def all_found(output: str, references: Sequence[str], choices: Sequence[str] = ()) -> float:
    """Share of the references that occur (`string_match_all`)."""
    answer = output.lower()
    return sum(reference.lower() in answer for reference in references) / len(references)


def any_found(output: str, references: Sequence[str], choices: Sequence[str] = ()) -> float:
    """Whether at least one of the references occurs (`string_match_part`)."""
    answer = output.lower()
    return float(any(reference.lower() in answer for reference in references))


def first_number(output: str, references: Sequence[str], choices: Sequence[str] = ()) -> float:
    """Whether the first number of the answer is the reference (LongEval)."""
    found = re.search(r"\d+", output)
    return float(found is not None and found[0] in references)
