# SPDX-License-Identifier: Apache-2.0
"""JSON for results that are kept: a measurement a line, so that a change is seen line by line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

# Longer containers of containers are broken up.
_WIDTH = 100


def readable(value: Any, digits: int | None = None) -> str:
    """JSON text in which a list or object of plain values, or a short one, takes one line.

    Args:
        value: Of what JSON has: dictionaries with text as keys, lists, numbers, text, None.
        digits: Significant digits of numbers that are not whole; None for all.

    Returns:
        The text, of lines that end with one of their own.
    """
    return "".join(_pieces(value if digits is None else _rounded(value, digits), "")) + "\n"


def _pieces(value: Any, indent: str) -> Iterator[str]:
    line = json.dumps(value, ensure_ascii=False)
    if _is_flat(value) or len(indent) + len(line) <= _WIDTH:
        yield line
        return
    deeper = indent + " "
    is_object = isinstance(value, dict)
    yield "{" if is_object else "["
    items = value.items() if isinstance(value, dict) else ((None, item) for item in value)
    for number, (key, item) in enumerate(items):
        yield (",\n" if number else "\n") + deeper
        if is_object:
            yield f"{json.dumps(key, ensure_ascii=False)}: "
        yield from _pieces(item, deeper)
    yield f"\n{indent}" + ("}" if is_object else "]")


def _is_flat(value: Any) -> bool:
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return not any(isinstance(item, dict | list) for item in items)


def _rounded(value: Any, digits: int) -> Any:
    if isinstance(value, float):
        return int(value) if value.is_integer() else float(f"{value:.{digits}g}")
    if isinstance(value, dict):
        return {key: _rounded(item, digits) for key, item in value.items()}
    return [_rounded(item, digits) for item in value] if isinstance(value, list) else value
