# SPDX-License-Identifier: Apache-2.0
"""What one request may ask for through `vllm_xargs`."""

import difflib
import functools
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ems_vllm.config.errors import ConfigError, RequestError, shown, shown_key
from ems_vllm.config.protect import Protect
from ems_vllm.plan import PlanSettings

if TYPE_CHECKING:
    from ems_vllm._C import CompressionPlan

# A child of vLLM's logger, so that its settings apply.
logger = logging.getLogger("vllm.ems")

KEYS = ("kv_compression", "kv_budget", "kv_ratio", "kv_protect")
# How alike a key and one of ours are when it is taken for a typing error. vLLM and other
# extensions read keys of their own, some of which begin like ours (kv_cache_report_mode).
_ALIKE = 0.75
# Each is compared with ours, by frontend and scheduler.
MOST_KEYS = 256


@dataclass(frozen=True)
class RequestOptions:
    """Compression settings of one request.

    Attributes:
        enabled: False keeps the request's whole cache.
        budget: Entries kept per kv_head, at most the server's; None: the server's.
        ratio: Fraction of the prompt kept, at most the server's; None: the server's.
        protect: Which tokens of the prompt stay whole; None: nothing was said, so the server's.
        is_asked_for: Whether the request says itself that it is to be compressed.
    """

    enabled: bool = True
    budget: int | None = None
    ratio: float | None = None
    protect: Protect | None = None
    is_asked_for: bool = False

    @classmethod
    def parse(cls, extra_args: Mapping[str, Any] | None) -> "RequestOptions":
        """Read `SamplingParams.extra_args`; keys of vLLM and other extensions are left alone.

        Raises:
            RequestError: with the key, the value and what is allowed.
        """
        if not extra_args:
            return cls()
        if len(extra_args) > MOST_KEYS:
            raise RequestError(
                f"vllm_xargs={shown(extra_args)} is not allowed: it has {len(extra_args)} keys; "
                f"send at most {MOST_KEYS}.",
                "too_many_keys",
            )
        for key, value in extra_args.items():
            if key not in KEYS and (near := _misspelt(key)):
                raise RequestError(
                    f"vllm_xargs.{shown_key(key)}={shown(value)} is not a setting: use {near!r}.",
                    "misspelt",
                )
        mode = extra_args.get("kv_compression", "on")
        if mode not in ("on", "off"):
            raise RequestError(
                f"vllm_xargs.kv_compression={shown(mode)} is not allowed: use 'on' or 'off'; the "
                "method is the server's.",
                "kv_compression",
            )
        budget = extra_args.get("kv_budget")
        if budget is not None and (
            isinstance(budget, bool) or not isinstance(budget, int) or budget < 1
        ):
            raise RequestError(
                f"vllm_xargs.kv_budget={shown(budget)} is not allowed: give a whole number of "
                "entries, at least 1.",
                "kv_budget",
            )
        ratio = extra_args.get("kv_ratio")
        if ratio is not None:
            if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 < ratio < 1:
                raise RequestError(
                    f"vllm_xargs.kv_ratio={shown(ratio)} is not allowed: give a fraction of the "
                    "prompt between 0 and 1.",
                    "kv_ratio",
                )
            ratio = float(ratio)
        if budget is not None and ratio is not None:
            raise RequestError(
                f"vllm_xargs.kv_budget={shown(budget)} and vllm_xargs.kv_ratio={ratio} do not fit "
                "together: send one of them.",
                "kv_budget",
            )
        protect = None
        if extra_args.get("kv_protect") is not None:
            protect = Protect.parse(extra_args["kv_protect"])
        # What protects nothing is as little of a wish as nothing.
        wishes = {"kv_budget": budget, "kv_ratio": ratio, "kv_protect": protect or None}
        for key, value in wishes.items():
            if mode == "off" and value is not None:
                raise RequestError(
                    f"vllm_xargs.{key}={shown(extra_args[key])} has no effect with "
                    "vllm_xargs.kv_compression='off': send one of them.",
                    key,
                )
        asks = extra_args.get("kv_compression") == "on" or budget is not None or ratio is not None
        return cls(mode == "on", budget, ratio, protect, is_asked_for=asks)

    @classmethod
    def parse_admitted(cls, extra_args: Mapping[str, Any] | None) -> "RequestOptions":
        """As `parse`, for the engine, which a bad request must not take down.

        The frontend refuses such a request. From a frontend without that check it is served with
        the server's settings, by scheduler and workers alike, and logged; one that wants tokens
        protected keeps its whole cache instead, unless the server's `allow_off` forbids that.
        """
        try:
            return cls.parse(extra_args)
        except ConfigError as error:
            logger.warning("A request reached the engine unchecked: %s", error)
            return cls(enabled=not (extra_args and extra_args.get("kv_protect")))

    def checked_again(
        self,
        prompt_len: int,
        num_tokens: int,
        plans: "Iterable[CompressionPlan]",
        num_sinks: int,
    ) -> "RequestOptions":
        """As `parse_admitted`, for what is protected, once the prompt's length is known.

        Args: See Protect.check.

        Returns:
            These options, or those of a request that keeps its whole cache, where the server allows
            that: nothing is dropped that should have stayed.
        """
        if self.protect is None:
            return self
        try:
            self.protect.check(prompt_len, num_tokens, plans, num_sinks)
        except ConfigError as error:
            logger.error("A request reached the engine unchecked: %s", error)
            return RequestOptions(enabled=False)
        return self

    def check_ceiling(self, settings: PlanSettings) -> None:
        """Refuse a request for what the server does not grant.

        Raises:
            RequestError: `kv_budget` or `kv_ratio` is above the ceiling, or `kv_compression` is off
                where that is not allowed.
        """
        if not self.enabled and not settings.allow_off:
            raise RequestError(
                "vllm_xargs.kv_compression='off' is not allowed on this server: leave it out, or "
                "start the server with allow_off=true.",
                "kv_compression",
            )
        instead = " or kv_compression='off'" if settings.allow_off else ""
        # A ratio's entries depend on the prompt; the plan caps them at the ceiling.
        ceiling = max(settings.budget or 0, settings.max_budget or 0)
        if self.budget is not None and ceiling and self.budget > ceiling:
            raise RequestError(
                f"vllm_xargs.kv_budget={shown(self.budget)} is not allowed: this server keeps at "
                f"most {ceiling} entries; send at most that{instead}.",
                "kv_budget",
            )
        if (
            self.ratio is not None
            and settings.ratio is not None
            and settings.max_budget is None
            and self.ratio > settings.ratio
        ):
            raise RequestError(
                f"vllm_xargs.kv_ratio={self.ratio} is not allowed: this server keeps at most "
                f"{settings.ratio} of a prompt; send at most that{instead}.",
                "kv_ratio",
            )


def _misspelt(key: Any) -> str | None:
    """The key of ours that `key` was probably meant to be."""
    if not isinstance(key, str) or len(key) > 2 * max(map(len, KEYS)):
        return None
    return _near(key)


# Every sequence of a request has the same keys, and most requests those of the ones before.
@functools.lru_cache(maxsize=4 * MOST_KEYS)
def _near(key: str) -> str | None:
    near = difflib.get_close_matches(key.lower().replace("-", "_"), KEYS, n=1, cutoff=_ALIKE)
    return near[0] if near else None
