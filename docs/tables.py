# SPDX-License-Identifier: Apache-2.0
"""Tables of measured figures in pages.

In a page, between `<!-- table NAME -->` and `<!-- end -->`, stands what TABLES[NAME] gives, so that
no figure is copied by hand: `python docs/generate.py` writes it, tests/test_docs.py compares.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial

from loss_tables import behind, peers, recipes

_MARKED = re.compile(r"(<!-- table (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def fill(page: str) -> str:
    """A page with its tables as they are now."""
    return _MARKED.sub(lambda found: f"{found[1]}{TABLES[found[2]]()}\n{found[3]}", page)


_SMOLLM2 = "lab-smollm2-scorers.json"
_SMOLLM2_PEERS = "kvpress-smollm2-answers.json"

TABLES: dict[str, Callable[[], str]] = {
    "smollm2-recipes": partial(
        recipes,
        _SMOLLM2,
        (
            "ems",
            "ems, not merged",
            "ems, alignment mean, not merged",
            "snapkv pooled forward over 13",
            "snapkv",
            "h2o",
            "knorm",
            "streaming_llm",
        ),
    ),
    "smollm2-peers": partial(peers, _SMOLLM2, _SMOLLM2_PEERS),
    "smollm2-behind": partial(behind, _SMOLLM2, _SMOLLM2_PEERS),
}
