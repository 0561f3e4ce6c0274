# SPDX-License-Identifier: Apache-2.0
"""The kv_heads of a random model hardly differ in what they attend to; here they do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from unittest import mock

import torch

from ems_vllm.policies.allocators.ada import AdaAllocator


@contextmanager
def unlike_heads() -> Iterator[list[list[list[int]]]]:
    """The allocator `ada` sees higher scores in later heads, up to twice as high in the last one.

    Yields:
        What it deals, [num_requests][num_heads] pages at a time.
    """
    dealt: list[list[list[int]]] = []
    deal = AdaAllocator.deal

    def deal_unlike(allocator, context, scores, budgets):
        compared = scores.weights if scores.mass is None else scores.mass
        factors = torch.linspace(1, 2, context.rows_together).repeat(len(budgets))
        unlike = replace(scores, mass=compared * factors[:, None, None])
        pages = deal(allocator, context, unlike, budgets)
        dealt.append(pages.tolist())
        return pages

    with mock.patch.object(AdaAllocator, "deal", deal_unlike):
        yield dealt
