# SPDX-License-Identifier: Apache-2.0
"""What `ems-vllm doctor MODEL` prints: its schema."""

from __future__ import annotations

from enum import StrEnum
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError


class Status(StrEnum):
    """Of one thing, and of all.

    Attributes:
        OK: It works.
        DEGRADED: It works, and something is lost.
        UNKNOWN: Only the server itself can tell.
        REFUSED: The server would not start.
    """

    OK = "ok"
    UNKNOWN = "unknown"
    DEGRADED = "degraded"
    REFUSED = "refused"


# From the one that matters least.
_ORDER = (Status.OK, Status.UNKNOWN, Status.DEGRADED, Status.REFUSED)


class Check(BaseModel):
    """One thing that was looked at.

    Attributes:
        name: What, in a word or two.
        status: What came of it.
        finding: What was found. A refusal is the sentence of the server, its remedy in it.
        remedy: What to do, where something is to be done and the finding does not say it.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    status: Status
    finding: str
    remedy: str | None = None


class Capacity(BaseModel):
    """Requests of max_model_len that the pool holds.

    Attributes:
        is_estimate: Whether the memory for the cache was reckoned rather than given.
        cache_bytes: Of each worker, for the cache and what compression holds beside it.
        beside_bytes: Of these, what compression holds.
        num_blocks: Blocks that requests can hold.
        max_model_len: Tokens.
        dense, compressed: Requests that fit.
        with_one_coming_in: Compressed ones, of which the prompt of one is still processed.
        dense_blocks, compressed_blocks: Of each, at most, once its prompt is compressed.
    """

    model_config = ConfigDict(frozen=True)

    is_estimate: bool
    cache_bytes: int
    beside_bytes: int
    num_blocks: int
    max_model_len: int
    dense: float
    compressed: float
    with_one_coming_in: int
    dense_blocks: int
    compressed_blocks: int


class StartReport(BaseModel):
    """Of a server that has not been started.

    Attributes:
        schema_version: Raised when a field changes its meaning or goes.
        model: As it was given; None where it did not come that far.
        recipe: That compresses, likewise.
        recipe_is_assumed: Whether no recipe was named.
        status: The worst of the checks.
        checks: In the order in which a server would meet them.
        capacity: None where it is not known before the start.
    """

    model_config = ConfigDict(frozen=True)

    schema_version: Literal[1] = 1
    model: str | None = None
    recipe: str | None = None
    recipe_is_assumed: bool = False
    status: Status
    checks: tuple[Check, ...]
    capacity: Capacity | None = None


def worst(checks: list[Check]) -> Status:
    """Of several; OK where there are none."""
    return max((check.status for check in checks), key=_ORDER.index, default=Status.OK)


def ok(name: str, finding: str) -> Check:
    return Check(name=name, status=Status.OK, finding=finding)


def degraded(name: str, finding: str, remedy: str) -> Check:
    return Check(name=name, status=Status.DEGRADED, finding=finding, remedy=remedy)


def unknown(name: str, finding: str, remedy: str) -> Check:
    return Check(name=name, status=Status.UNKNOWN, finding=finding, remedy=remedy)


def refused(name: str, error: object, remedy: str | None = None) -> Check:
    return Check(name=name, status=Status.REFUSED, finding=str(error), remedy=remedy)


def sentence(error: Exception) -> str:
    """What another package's exception says, on one line."""
    said = str(error)
    if isinstance(error, ValidationError):
        said = "; ".join(one["msg"].removeprefix("Value error, ") for one in error.errors())
    return f"{type(error).__name__}: {' '.join(said.split()) or 'no reason given'}"
