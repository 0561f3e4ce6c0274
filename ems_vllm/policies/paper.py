# SPDX-License-Identifier: Apache-2.0
"""Where a component comes from."""

from __future__ import annotations

from typing import NamedTuple


class Paper(NamedTuple):
    """A publication.

    Attributes:
        method: Name of the method.
        authors: First of them, as it is cited.
        year: Of the first version.
        arxiv: Number at arXiv, or "" for none.
        venue: Where it appeared, if it is not at arXiv.
    """

    method: str
    authors: str
    year: int
    arxiv: str = ""
    venue: str = ""

    @property
    def url(self) -> str:
        return f"https://arxiv.org/abs/{self.arxiv}" if self.arxiv else ""

    def __str__(self) -> str:
        where = f"arXiv:{self.arxiv}" if self.arxiv else self.venue
        return f"{self.method} ({self.authors} {self.year}, {where})"


EMS = Paper("EMS", "Li et al.", 2024, "2412.08521")
