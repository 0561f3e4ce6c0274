# SPDX-License-Identifier: Apache-2.0
"""Makes a prompt as long as it may be."""

from __future__ import annotations

from collections.abc import Callable


def largest_fitting(
    count: Callable[[int], int], room: int, minimum: int, maximum: int | None = None
) -> int | None:
    """The largest size whose prompt fits, for prompts that grow with their size.

    Doubling finds an upper bound and bisection the size; where token counts are not quite monotone
    (merges across a seam), the answer still fits, and one more does not.

    Args:
        count: Tokens of the prompt of a given size.
        room: Tokens that the prompt may have.
        minimum, maximum: Smallest and largest size there is; None: no largest.

    Returns:
        None where not even `minimum` fits.
    """
    if count(minimum) > room:
        return None
    if maximum is not None and count(maximum) <= room:
        return maximum
    fits, step = minimum, 1
    while (maximum is None or fits + step < maximum) and count(fits + step) <= room:
        fits += step
        step *= 2
    too_large = fits + step if maximum is None else min(fits + step, maximum)
    while too_large - fits > 1:
        middle = (fits + too_large) // 2
        if count(middle) <= room:
            fits = middle
        else:
            too_large = middle
    return fits
