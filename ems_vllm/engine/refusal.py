# SPDX-License-Identifier: Apache-2.0
"""A refusal to start: one sentence with the setting, its value, the reason and the remedy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ems_vllm.config import ConfigError


@dataclass(frozen=True)
class Refusal:
    """Something that compression cannot work with.

    Attributes:
        key: The setting, as the operator knows it.
        reason: Why it cannot work.
        remedy: What to do.
    """

    key: str
    reason: str
    remedy: str

    def error(self, value: Any, recipe: str, **details: Any) -> ConfigError:
        """The one sentence: setting, value, reason and remedy.

        Args:
            value: What the setting is.
            recipe: The recipe in use.
            details: Fill the names in braces of `reason` and `remedy`.
        """
        return ConfigError(
            f"{self.key}={value!r} cannot be combined with kv_compression={recipe!r}: "
            f"{self.reason.format(**details)}; {self.remedy.format(**details)}, or set "
            "kv_compression to off."
        )
