# SPDX-License-Identifier: Apache-2.0
"""A method is a recipe: what its file and its components say of it."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from ems_vllm.config import ConfigError, load_config, recipes
from ems_vllm.config.errors import shown
from ems_vllm.methods.measured import Measured, compaction_time, measured
from ems_vllm.policies.base import Component
from ems_vllm.policies.paper import Paper

PARTS = ("scorer", "allocator", "selector", "merger")
# What a method may need, and how a narrow table says it.
CODES = {
    "attention of the prompt": "A",
    "last queries": "Q",
    "output projections": "O",
    "a profile of the model": "P",
    "unequal layers": "L",
    "unequal heads": "H",
}


@dataclass(frozen=True)
class Method:
    """A recipe that ships.

    Attributes:
        name: Of the recipe.
        source: Where it comes from, in words, as its file begins.
        keeps: What stays, in words.
        papers: Of all its components; none where all of it is ours.
        parts: Names of its components by kind.
        needs: What a server or a model must have for it, in words.
        is_neutral: Whether hits in the prefix cache, preemptions and chunks change no answer.
        measured: Losses by model, of those on which it was measured.
        compaction_time: That of `ems` being 1; None where it was not measured.
    """

    name: str
    source: str
    keeps: str
    papers: tuple[Paper, ...]
    parts: dict[str, str]
    needs: tuple[str, ...]
    is_neutral: bool
    measured: dict[str, Measured]
    compaction_time: float | None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return {
            "name": self.name,
            "source": self.source,
            "keeps": self.keeps,
            "papers": [{**paper._asdict(), "url": paper.url} for paper in self.papers],
            **self.parts,
            "needs": list(self.needs),
            "neutral_to_hits": self.is_neutral,
            "measured": {model: one.to_dict() for model, one in self.measured.items()},
            "compaction_time": self.compaction_time,
        }


def method(recipe: str) -> Method:
    """What is known of a recipe that ships.

    Raises:
        ConfigError: there is no such recipe.
    """
    if recipe not in recipes.names():
        raise ConfigError(
            f"method={shown(recipe)} is not a recipe that ships: use {', '.join(recipes.names())}."
        )
    config = load_config(recipe)
    assert config is not None
    components: dict[str, Component] = {part: getattr(config, part) for part in PARTS}
    # Each once, in the order in which they work.
    papers = dict.fromkeys(paper for part in components.values() for paper in part.papers)
    source, keeps = recipes.described(recipe)
    return Method(
        name=recipe,
        source=source,
        keeps=keeps,
        papers=tuple(papers),
        parts={part: component.name() for part, component in components.items()},
        needs=_needs(config),
        is_neutral=config.is_neutral_to_hits,
        measured=measured(recipe),
        compaction_time=compaction_time(recipe),
    )


def methods() -> list[Method]:
    """All recipes that ship."""
    return [method(name) for name in recipes.names()]


def _needs(config: Any) -> tuple[str, ...]:
    scorer, allocator = config.scorer, config.allocator
    is_so = (
        scorer.uses_accumulated,
        scorer.uses_window,
        config.selector.reads_output_weights,
        scorer.reads_profile or allocator.reads_profile,
        allocator.deals_to_layers,
        allocator.deals_to_heads,
    )
    return tuple(need for need, needed in zip(CODES, is_so, strict=True) if needed)


def summary(cls: type[Component]) -> str:
    """The first sentence of what a component says of itself."""
    text = inspect.cleandoc(cls.__doc__ or "")
    return text.split("\n\n")[0].replace("\n", " ")
