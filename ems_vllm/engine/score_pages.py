# SPDX-License-Identifier: Apache-2.0
"""Where the accumulated scores of a request live.

A score is addressed like the cache: page = block id. Blocks that came from the prefix cache belong
to several requests, which must not add to each other's scores; for those columns a request gets
private pages behind the ones of the blocks. The scheduler keeps the same count and shortens a hit
for which there are no pages (`CompressedAttentionManager.admit`), so they never run out here.
"""

from __future__ import annotations


class PrivatePages:
    """Free list of the private score pages.

    Args:
        first_page: Id of the first private page: the number of blocks of the cache.
        num_pages: How many there are.
    """

    def __init__(self, first_page: int, num_pages: int) -> None:
        self._free = list(range(first_page + num_pages - 1, first_page - 1, -1))

    def take(self, count: int) -> list[int]:
        assert count <= len(self._free), "scheduler and worker disagree on the free score pages"
        return [self._free.pop() for _ in range(count)]

    def give_back(self, pages: list[int]) -> None:
        self._free.extend(reversed(pages))
        pages.clear()


def num_prefix_score_pages(
    configured_tokens: int | None, max_model_len: int, max_num_batched_tokens: int, block_size: int
) -> int:
    """Private pages of one layer.

    Unless configured: room for one prefix of the greatest length and for the shorter ones that
    can finish their prefill in the same step (ours).
    """
    tokens = configured_tokens
    if tokens is None:
        tokens = max_model_len + 4 * max_num_batched_tokens
    return -(-tokens // block_size)
