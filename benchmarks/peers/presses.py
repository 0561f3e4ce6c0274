# SPDX-License-Identifier: Apache-2.0
"""kvpress' presses by the names under which results know them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from peers.budgets import WINDOW, chunks, compression_ratio, pyramid_beta, window_size

if TYPE_CHECKING:
    from kvpress import BasePress

    from peers.scorers import Memo

ENGINE = "kvpress"
# Epsilon of ExpectedAttention where AdaKV is around it, as in kvpress' own comparisons.
_ADAKV_EPSILON = 1e-2


@dataclass(frozen=True)
class PressOptions:
    """What a press is built from.

    Attributes:
        entries: Per kv_head; None for all.
        prompt_len: Tokens of the prompt.
        seed: Of presses that draw; without one their choice would differ from run to run.
        memo: Scores of this prompt that presses share.
        max_window: Observation window, where the budget has room for it.
    """

    entries: int | None
    prompt_len: int
    seed: int
    memo: Memo = field(default_factory=dict)
    max_window: int = WINDOW

    @property
    def ratio(self) -> float:
        """Fraction of the entries that is dropped."""
        return compression_ratio(self.entries, self.prompt_len)

    @property
    def window(self) -> int:
        """Observation window, for presses that have one."""
        return window_size(self.entries, self.prompt_len, self.max_window)


def _factories() -> dict[str, Callable[[PressOptions], BasePress]]:
    # Imported here: the names are needed, and tested, where kvpress is not installed.
    import kvpress

    from peers.cam import PromptCam
    from peers.pyramid import Pyramid
    from peers.scorers import Seeded, SharedScorer

    def snapkv(options: PressOptions) -> Any:
        press = kvpress.SnapKVPress(options.ratio, window_size=options.window)
        return SharedScorer(press, ("snapkv", options.window), options.memo)

    def knorm(options: PressOptions) -> Any:
        return SharedScorer(kvpress.KnormPress(options.ratio), "knorm", options.memo)

    def expected_attention(options: PressOptions, epsilon: float = 0.0) -> Any:
        press = kvpress.ExpectedAttentionPress(options.ratio, epsilon=epsilon)
        return SharedScorer(press, ("expected_attention", epsilon), options.memo)

    def pyramidkv(options: PressOptions) -> Any:
        beta = pyramid_beta(options.entries, options.prompt_len, options.max_window)
        return Pyramid(options.ratio, window_size=options.window, beta=beta)

    def chunkkv(options: PressOptions) -> Any:
        length, ratio = chunks(options.entries, options.prompt_len)
        press = snapkv(options)
        press.compression_ratio = ratio
        return kvpress.ChunkKVPress(press, chunk_length=length)

    def compactor(options: PressOptions) -> Any:
        return Seeded(kvpress.CompactorPress(options.ratio), options.seed)

    def cam(base: Any, options: PressOptions) -> Any:
        # CAMPress has its own, from the number of entries.
        base.compression_ratio = 0.0
        return Seeded(PromptCam(base, options.entries, options.window), options.seed)

    def finch(options: PressOptions) -> Any:
        press = kvpress.FinchPress(options.ratio)
        press.window_size = options.window
        return press

    def kvzip(options: PressOptions) -> Any:
        return kvpress.KVzipPress(compression_ratio(options.entries, options.prompt_len, -1e-6))

    return {
        "knorm": knorm,
        "snapkv": snapkv,
        "pyramidkv": pyramidkv,
        "adakv_snapkv": lambda o: kvpress.AdaKVPress(snapkv(o)),
        "criticalkv_snapkv": lambda o: kvpress.CriticalKVPress(snapkv(o)),
        "criticaladakv_snapkv": lambda o: kvpress.CriticalAdaKVPress(snapkv(o)),
        "chunkkv_snapkv": chunkkv,
        "tova": lambda o: kvpress.TOVAPress(o.ratio),
        "streaming_llm": lambda o: kvpress.StreamingLLMPress(o.ratio),
        "expected_attention": expected_attention,
        "adakv_expected_attention": lambda o: kvpress.AdaKVPress(
            expected_attention(o, _ADAKV_EPSILON)
        ),
        "keydiff": lambda o: kvpress.KeyDiffPress(o.ratio),
        "compactor": compactor,
        "finch": finch,
        "kvzip": kvzip,
        "merging_snapkv": lambda o: kvpress.MergingPress(snapkv(o)),
        "merging_knorm": lambda o: kvpress.MergingPress(knorm(o)),
        "merging_expected_attention": lambda o: kvpress.MergingPress(expected_attention(o)),
        "cam_snapkv": lambda o: cam(snapkv(o), o),
        "cam_knorm": lambda o: cam(knorm(o), o),
        "random": lambda o: kvpress.RandomPress(o.ratio, seed=o.seed),
    }


NAMES = (
    "knorm",
    "snapkv",
    "pyramidkv",
    "adakv_snapkv",
    "criticalkv_snapkv",
    "criticaladakv_snapkv",
    "chunkkv_snapkv",
    "tova",
    "streaming_llm",
    "expected_attention",
    "adakv_expected_attention",
    "keydiff",
    "compactor",
    "finch",
    "kvzip",
    "merging_snapkv",
    "merging_knorm",
    "merging_expected_attention",
    "cam_snapkv",
    "cam_knorm",
    "random",
)

# FINCH moves entries to other positions, which layers with a window must not be told; KVzip
# refuses such models.
WITHOUT_SLIDING_WINDOWS = frozenset({"finch", "kvzip"})


def build(name: str, options: PressOptions) -> BasePress:
    """The press of that name; KeyError for an unknown one."""
    return _factories()[name](options)
