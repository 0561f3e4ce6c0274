# SPDX-License-Identifier: Apache-2.0
"""From entries per kv_head, as docs/evaluation.md counts them, to the options of kvpress.

kvpress takes a ratio, keeps `int(prompt_len * (1 - ratio))` entries and counts its window among
them. Everywhere here, `entries` is None where all entries of a prompt stay.
"""

from __future__ import annotations

# Queries that score, and newest entries that always stay; obs_window of our recipes.
WINDOW = 16
# Put between two whole numbers of entries, so that neither truncation nor rounding moves it.
_MARGIN = 0.01


def entries_kept(total: int | None, prompt_len: int) -> int | None:
    """Entries to keep of a prompt of `prompt_len` tokens; None for all of them.

    Args:
        total: The budget at the prompt's nominal length; None for no limit.
    """
    return total if total is not None and total < prompt_len else None


def compression_ratio(entries: int | None, prompt_len: int, margin: float = _MARGIN) -> float:
    """The ratio at which kvpress keeps exactly so many entries.

    Args:
        entries: Per kv_head; None for all.
        prompt_len: Tokens of the prompt.
        margin: Slightly negative for KVzip, which truncates what it drops of all layers together.
    """
    return 0.0 if entries is None else 1 - (entries + margin) / prompt_len


def window_size(entries: int | None, prompt_len: int, window: int = WINDOW) -> int:
    """The observation window: at most half of the entries, and less than the prompt.

    A press keeps its whole window, so one as large as the budget would leave no entry to choose.
    """
    kept = prompt_len if entries is None else entries
    return max(1, min(window, kept // 2, prompt_len - 1))


def pyramid_beta(
    entries: int | None, prompt_len: int, window: int = WINDOW, default: int = 20
) -> int:
    """PyramidKV's slope: the default, or the steepest one that kvpress carries out.

    The last layer gets entries / beta; where that is less than the window, kvpress would give all
    layers the same.
    """
    kept = prompt_len if entries is None else entries
    return max(1, min(default, kept // window_size(entries, prompt_len, window)))


def chunks(entries: int | None, prompt_len: int, default: int = 20) -> tuple[int, float]:
    """ChunkKV's chunk length, and the ratio at which it keeps at most so many entries.

    It keeps whole chunks, the incomplete one at the end among them, which has most of the window.

    Returns:
        The length: the default, or less where a budget would have fewer than four chunks. And
        the ratio.
    """
    if entries is None:
        return default, 0.0
    length = max(1, min(default, entries // 4))
    complete, rest = divmod(prompt_len, length)
    kept = (entries - rest) // length + (rest > 0)
    return length, compression_ratio(kept, complete + (rest > 0))
