# SPDX-License-Identifier: Apache-2.0
"""A typed name -> class table that fails with the list of known names."""

import difflib
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Registry(Generic[T]):
    """Classes of one kind by name.

    Args:
        kind: What the entries are ("scorer", "merger"), for error messages.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, type[T]] = {}

    def register(self, name: str) -> Callable[[type[T]], type[T]]:
        """Decorator that files a class under `name`; a second class of that name is an error."""

        def decorator(cls: type[T]) -> type[T]:
            known = self._entries.get(name)
            if known is not None and known is not cls:
                raise ValueError(f"{self.kind} {name!r} is already {known.__qualname__}")
            self._entries[name] = cls
            return cls

        return decorator

    def get(self, name: str) -> type[T]:
        """The class filed under `name`; KeyError with the known names and the nearest one."""
        if name in self._entries:
            return self._entries[name]
        near = difflib.get_close_matches(str(name), self._entries, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise KeyError(f"unknown {self.kind} {name!r}; {hint}known: {', '.join(self.names())}")

    def names(self) -> list[str]:
        return sorted(self._entries)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())
