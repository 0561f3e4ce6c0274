# SPDX-License-Identifier: Apache-2.0
"""What a request wants to keep whole: `vllm_xargs.kv_protect`, and whether there is room for it."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from ems_vllm.config.errors import RequestError, shown
from ems_vllm.spans import Span, merged, num_covered

if TYPE_CHECKING:
    from ems_vllm._C import CompressionPlan

KEY = "kv_protect"
Role = Literal["system", "last_user", "tools"]
ROLES: tuple[str, ...] = get_args(Role)
NOTHING = "none"

_RANGE = re.compile(r"([0-9]{1,10})-([0-9]{1,10})")
# More than anybody has parts of a prompt to name: frontend and scheduler read them all.
MOST_ITEMS = 1024


@dataclass(frozen=True)
class Protect:
    """Tokens of a prompt that stay as they are: never dropped, never merged into.

    Attributes:
        ranges: Spans of positions in the prompt's tokens, in order and apart.
        roles: Of ROLES, in that order: spans that are found through the chat template. Where a
            request reaches the engine there is none left.
    """

    ranges: tuple[Span, ...] = ()
    roles: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        """Whether anything is protected."""
        return bool(self.ranges or self.roles)

    @classmethod
    def parse(cls, value: Any) -> "Protect":
        """Read `kv_protect`: a list of ranges `start-stop` and roles, or one text with commas.

        A range is half-open: `0-128` are the first 128 tokens of the prompt. "none", and a list of
        nothing, protect nothing.

        Raises:
            RequestError: with the key, the value and what is allowed.
        """
        items: Any = value.split(",") if isinstance(value, str) else value
        if not isinstance(items, Sequence) or not all(isinstance(item, str) for item in items):
            raise _not_allowed(value)
        if len(items) > MOST_ITEMS:
            raise RequestError(
                f"vllm_xargs.{KEY}={shown(value)} is not allowed: these are {len(items)} ranges "
                f"and roles; send at most {MOST_ITEMS}, ranges that adjoin as one.",
                KEY,
            )
        items = [item.strip() for item in items]
        if items == [NOTHING]:
            return cls()
        ranges, roles = [], set()
        for item in items:
            if item in ROLES:
                roles.add(item)
            elif found := _RANGE.fullmatch(item):
                start, stop = map(int, found.groups())
                if start >= stop:
                    raise RequestError(
                        f"vllm_xargs.{KEY}={shown(value)} is not allowed: {shown(item)} holds no "
                        "token; give the position of the first one and, after it, of the one "
                        "behind the last.",
                        KEY,
                    )
                ranges.append((start, stop))
            else:
                raise _not_allowed(value, item)
        return cls(merged(ranges), tuple(role for role in ROLES if role in roles))

    def sent(self) -> list[str]:
        """The value of `kv_protect` that says this."""
        return [*(f"{start}-{stop}" for start, stop in self.ranges), *self.roles]

    def check(
        self,
        prompt_len: int,
        num_tokens: int,
        plans: "Iterable[CompressionPlan]",
        num_sinks: int,
        setting: str | None = None,
    ) -> None:
        """Refuse what the prompt does not have, or what the budget has no room for.

        Args:
            prompt_len: Tokens of the prompt.
            num_tokens: Tokens of prompt and answer at most.
            plans: Of the request, one for each level of layers.
            num_sinks: First tokens that always stay.
            setting: How messages call what asks for this; None for this value of `kv_protect`.

        Raises:
            RequestError: with the key, the numbers and the remedy.
        """
        if self.roles:
            raise RequestError(
                f"vllm_xargs.{KEY}={shown(self.sent())} is not allowed here: "
                f"{', '.join(self.roles)} can be found in chat completions only; give ranges of "
                "the prompt's tokens, such as '0-128'.",
                KEY,
            )
        if not self.ranges:
            return
        setting = setting or f"vllm_xargs.{KEY}={shown(self.sent())}"
        if self.ranges[-1][1] > prompt_len:
            raise RequestError(
                f"{setting} is not allowed: the prompt has {prompt_len} tokens, so ranges end at "
                f"{prompt_len} at the latest; give positions of the prompt.",
                KEY,
            )
        for plan in plans:
            # What is compressed only grows, and budgets stay: the last compaction decides.
            first, tail = plan.columns(num_tokens - 1)
            if first == 0:
                continue
            end, kept = tail * plan.block_size, plan.budget_blocks * plan.block_size
            reserved = num_covered([(0, num_sinks), *self.ranges], end)
            if reserved > kept:
                covered = num_covered(self.ranges, end)
                raise RequestError(
                    f"{setting} is not allowed: it covers {covered} tokens of what is compressed, "
                    f"which with {num_sinks} sinks makes {reserved}, and {kept} entries are kept; "
                    "protect fewer tokens, ask for a larger kv_budget, or send "
                    f"{KEY}={NOTHING!r}.",
                    KEY,
                )


def _not_allowed(value: Any, item: str | None = None) -> RequestError:
    what = "" if item is None else f"{shown(item)} is neither a range nor a role; "
    return RequestError(
        f"vllm_xargs.{KEY}={shown(value)} is not allowed: {what}give a list of ranges of the "
        f"prompt's tokens such as '0-128', and of roles ({', '.join(ROLES)}), or {NOTHING!r}.",
        KEY,
    )
