# SPDX-License-Identifier: Apache-2.0
"""Which parts of a policy, and settings beside them, do not go together."""

from __future__ import annotations

from ems_vllm.config.errors import ConfigError
from ems_vllm.keys import KEY_PREFIX
from ems_vllm.policies.base import Allocator, Scorer, Selector


def check(
    scorer: Scorer,
    allocator: Allocator,
    selector: Selector,
    coverage: float | None,
    prefill_interval: int,
) -> None:
    """Refuse what cannot be served together; all are settings of KVCompressionConfig.

    Raises:
        ConfigError: with the key, the value and the remedy.
    """
    if allocator.deals_to_heads:
        _check_unequal_heads(scorer, allocator, selector, coverage, prefill_interval)
    if coverage is not None and selector.goes_by_budget:
        raise ConfigError(
            f"{KEY_PREFIX}coverage={coverage} does not fit together with "
            f"selector={selector.name()!r}, whose order depends on how many entries stay: leave it "
            "out, or choose another selector."
        )
    if scorer.across_heads and not selector.follows_scores:
        # At the next compaction, entries of different heads would be taken for the same.
        raise ConfigError(
            f"{KEY_PREFIX}selector={selector.name()!r} does not fit together with "
            f"scorer={scorer.name()!r}: kv_heads of a layer would keep different entries, which "
            "this scorer scores together; choose another scorer or another selector."
        )


def _check_unequal_heads(
    scorer: Scorer,
    allocator: Allocator,
    selector: Selector,
    coverage: float | None,
    prefill_interval: int,
) -> None:
    """Of an allocator under which kv_heads keep different numbers of entries."""
    name = allocator.name()
    unequal = f"allocator={name!r}, under which kv_heads keep different numbers of entries"
    if prefill_interval:
        # The prompt's queries score whole blocks; such heads own parts of them.
        raise ConfigError(
            f"{KEY_PREFIX}prefill_interval={prefill_interval} does not fit together with "
            f"{unequal}: set it to 0, or choose an allocator that gives all as many."
        )
    if coverage is not None:
        # How many entries a layer keeps is decided for all layers of a block table at once,
        # and heads are dealt to layer by layer.
        raise ConfigError(
            f"{KEY_PREFIX}coverage={coverage} does not fit together with {unequal}: leave it out, "
            "or choose an allocator that gives all as many."
        )
    chosen: dict[str, Scorer | Selector] = {"scorer": scorer, "selector": selector}
    for key, part in chosen.items():
        if part.across_heads:
            raise ConfigError(
                f"{KEY_PREFIX}allocator={name!r} does not fit together with "
                f"{key}={part.name()!r}, under which all kv_heads of a layer keep the same "
                f"entries: choose an allocator that gives all as many, or another {key}."
            )
