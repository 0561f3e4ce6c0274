# SPDX-License-Identifier: Apache-2.0
"""Where the question stands, which decides what a compression can know of it.

* `last`: after the document, inside the prompt. The last queries of the prompt ask the question, so
  that methods which score by them see what will be needed.
* `first`: before the document. The document is read with the question in mind, but the last queries
  ask nothing: the prompt ends with "Answer:" or the like.
* `later`: the prompt is the document alone; the question comes once the cache has been compressed
  (several questions to one document, a tool's output that is asked about in later turns). What is
  kept must do for any question.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

Protocol = Literal["last", "first", "later"]
PROTOCOLS: tuple[Protocol, ...] = get_args(Protocol)
# What results without a protocol, older than the others, were made with.
LAST: Protocol = "last"
FIRST: Protocol = "first"
LATER: Protocol = "later"

TITLES: dict[str, str] = {
    LAST: "Question last",
    FIRST: "Question first",
    LATER: "Question later",
}
DESCRIPTIONS: dict[str, str] = {
    LAST: "the question stands after the document, inside the prompt",
    FIRST: "the question stands before the document",
    LATER: "the question comes after the document's cache has been compressed",
}


def ordered(protocols: Sequence[str]) -> list[str]:
    """Each once, in the order of PROTOCOLS."""
    return [protocol for protocol in PROTOCOLS if protocol in protocols]
