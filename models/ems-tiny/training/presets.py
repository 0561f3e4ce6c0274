# SPDX-License-Identifier: Apache-2.0
"""What to train for how long: `cpu` (two cores, under two hours) and `gpu` (one card)."""

from dataclasses import dataclass, field

from training.model import ModelConfig

SHORT_MIX = {"recall": 7, "copy": 1.5, "tracking": 0.7, "chat": 0.8}
MIX = {
    "recall": 7, "several": 0.7, "copy": 1, "tracking": 1, "frequent": 0.3, "chat": 1, "text": 0.7,
}  # fmt: skip


@dataclass(frozen=True)
class Stage:
    """Part of a run.

    Attributes:
        tokens: Where the stage ends, counted from the start of the run.
        lengths: Row length -> share of the steps.
        mix: Family -> share of the rows.
        stretched: Share of the rows with stretched positions.
    """

    tokens: int
    lengths: dict[int, float]
    mix: dict[str, float] = field(default_factory=lambda: dict(MIX))
    stretched: float = 0.5


@dataclass(frozen=True)
class Preset:
    """A whole run.

    Attributes:
        batch: Tokens per step.
        muon_lr, adam_lr: Peak learning rates of hidden matrices and of everything else.
        text_weight: Weight of the mean loss over text against that over answers.
        text_every: One in so many text positions gets logits: the head is a fifth of the work.
        warmup: Steps.
        decay: Share of the run in which the rates fall to 0 linearly.
    """

    model: ModelConfig
    stages: tuple[Stage, ...]
    batch: int
    muon_lr: float = 2e-3
    adam_lr: float = 2e-3
    text_weight: float = 0.3
    text_every: int = 4
    warmup: int = 100
    decay: float = 0.15
    seed: int = 2412

    @property
    def tokens(self) -> int:
        return self.stages[-1].tokens


M = 1_000_000
PRESETS = {
    "cpu": Preset(
        ModelConfig(hidden=160, intermediate=320, layers=4),
        (
            Stage(3 * M, {128: 1, 256: 1}, SHORT_MIX),
            Stage(5 * M, {128: 0.5, 256: 2, 512: 2}),
            Stage(6.5 * M, {256: 1, 512: 2, 1024: 1}),
            Stage(40 * M, {256: 1, 512: 1, 1024: 1.5, 2048: 0.7, 4096: 0.4}),
        ),
        batch=4096,
    ),
    "gpu": Preset(
        ModelConfig(hidden=384, intermediate=1024, layers=6, context=8192),
        (
            Stage(50 * M, {128: 1, 256: 1}, SHORT_MIX),
            Stage(120 * M, {256: 2, 512: 2, 1024: 1}),
            Stage(400 * M, {512: 1, 1024: 2, 2048: 2, 4096: 2, 8192: 2}),
        ),
        batch=65536,
        text_every=1,
    ),
    # For the tests.
    "toy": Preset(
        ModelConfig(hidden=32, intermediate=32, layers=2, heads=2, kv_heads=1, context=256),
        (Stage(2048, {64: 1}, SHORT_MIX), Stage(4096, {64: 1, 128: 1})),
        batch=512,
        warmup=2,
    ),
}
