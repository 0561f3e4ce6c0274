# SPDX-License-Identifier: Apache-2.0
"""Which settings of the guard do not go together, or with what they guard."""

from __future__ import annotations

from dataclasses import dataclass

from ems_vllm.config.errors import ConfigError
from ems_vllm.keys import KEY_PREFIX
from ems_vllm.policies.base import Scorer

TOLERANCE = 0.05
"""Share of the measured requests that may diverge before the others are no longer compressed
(ours)."""


@dataclass(frozen=True)
class GuardSettings:
    """See the settings of a server that begin with `guard_`."""

    share: float
    limit: float | None
    action: str
    tolerance: float

    def check(self, scorer: Scorer, *, allow_off: bool) -> None:
        """Refuse what could not do what it says.

        Args:
            scorer, allow_off: Of the server.

        Raises:
            ConfigError: with the key, the value and the remedy.
        """
        if not self.share and (self.limit is not None or self.action != "report"):
            is_limit = self.limit is not None
            key, value = ("guard_limit", self.limit) if is_limit else ("guard_action", self.action)
            raise ConfigError(
                f"{KEY_PREFIX}{key}={value!r} would change nothing with {KEY_PREFIX}guard_share=0: "
                f"set that to the share of requests that is to be measured, or leave {key} out."
            )
        if self.share and not scorer.uses_window:
            raise ConfigError(
                f"{KEY_PREFIX}guard_share={self.share} does not fit together with "
                f"scorer={scorer.name()!r}, which records no queries to measure with: set it to "
                "0, or choose a recipe that goes by recent attention."
            )
        if self.action == "dense":
            self._check_dense(allow_off)
        elif self.tolerance != TOLERANCE:
            raise ConfigError(
                f"{KEY_PREFIX}guard_tolerance={self.tolerance} would change nothing with "
                f'{KEY_PREFIX}guard_action="report": set that to "dense", or leave guard_tolerance '
                "out."
            )

    def _check_dense(self, allow_off: bool) -> None:
        dense = f'{KEY_PREFIX}guard_action="dense"'
        if self.limit is None:
            raise ConfigError(
                f"{dense} needs a {KEY_PREFIX}guard_limit, beyond which a request counts as "
                'diverging: set one, or set guard_action to "report".'
            )
        if self.share == 1:
            raise ConfigError(
                f"{KEY_PREFIX}guard_share=1.0 does not fit together with {dense}: requests that "
                "are measured are compressed in any case, so that it is noticed when they diverge "
                "no more; lower it."
            )
        if not allow_off:
            raise ConfigError(
                f"{dense} does not fit together with {KEY_PREFIX}allow_off=False, with which the "
                "pool need not hold a request's whole cache: set allow_off to true, or "
                'guard_action to "report".'
            )
