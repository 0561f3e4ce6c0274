# SPDX-License-Identifier: Apache-2.0
"""kvpress' presses by the names under which results know them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from peers.budgets import compression_ratio, pyramid_beta, window_size

if TYPE_CHECKING:
    from kvpress import BasePress

FULL = "full"


@dataclass(frozen=True)
class PressOptions:
    """What a press is built from.

    Attributes:
        ratio: Fraction of the entries that is dropped.
        window: Observation window, for presses that have one.
        beta: Slope of PyramidKV.
        seed: Of the random press; without one its choice would differ from run to run.
    """

    ratio: float
    window: int
    beta: int
    seed: int

    @classmethod
    def of(cls, entries: int | None, prompt_len: int, seed: int) -> PressOptions:
        return cls(
            compression_ratio(entries, prompt_len),
            window_size(entries, prompt_len),
            pyramid_beta(entries, prompt_len),
            seed,
        )


def _factories() -> dict[str, Callable[[PressOptions], BasePress]]:
    # Imported here: the names are needed, and tested, where kvpress is not installed.
    import kvpress

    def snapkv(options: PressOptions) -> kvpress.SnapKVPress:
        return kvpress.SnapKVPress(options.ratio, window_size=options.window)

    return {
        "knorm": lambda o: kvpress.KnormPress(o.ratio),
        "snapkv": snapkv,
        "pyramidkv": lambda o: kvpress.PyramidKVPress(o.ratio, window_size=o.window, beta=o.beta),
        "adakv_snapkv": lambda o: kvpress.AdaKVPress(snapkv(o)),
        "tova": lambda o: kvpress.TOVAPress(o.ratio),
        "streaming_llm": lambda o: kvpress.StreamingLLMPress(o.ratio),
        "expected_attention": lambda o: kvpress.ExpectedAttentionPress(o.ratio),
        "keydiff": lambda o: kvpress.KeyDiffPress(o.ratio),
        "merging_snapkv": lambda o: kvpress.MergingPress(snapkv(o)),
        "random": lambda o: kvpress.RandomPress(o.ratio, seed=o.seed),
    }


NAMES = (
    "knorm",
    "snapkv",
    "pyramidkv",
    "adakv_snapkv",
    "tova",
    "streaming_llm",
    "expected_attention",
    "keydiff",
    "merging_snapkv",
    "random",
)


def build(name: str, options: PressOptions) -> BasePress:
    """The press of that name; KeyError for an unknown one."""
    return _factories()[name](options)
