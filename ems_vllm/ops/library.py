# SPDX-License-Identifier: Apache-2.0
"""`@operator`: functions whose calls run in the compiled library, or their own bodies."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ParamSpec, Protocol, cast

import torch

P = ParamSpec("P")

_LIBRARY = Path(__file__).resolve().parent.parent / "_ops.abi3.so"

# Where calls go: an object with a callable by the name of every operator. None until the first.
_implementation: Any = None


class Operator(Protocol[P]):
    """An operator, called as the function that defines it.

    Attributes:
        reference: The function itself, which computes on any device in plain PyTorch.
    """

    reference: Callable[P, None]

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> None: ...


# By name. Filled by the decorator.
OPERATORS: dict[str, Operator[...]] = {}


def operator(reference: Callable[P, None]) -> Operator[P]:
    """Declare an operator of the compiled library.

    Args:
        reference: Has the operator's name and the arguments of its schema in csrc; its docstring
            is the contract and its body what the kernels are tested against. It writes in place
            and returns nothing, which is also all that tracing has to know (the fake).
    Returns:
        A function with the same signature that runs the compiled operator, or what
        `implemented_by` names instead, and has `reference` as an attribute.
    """
    name = reference.__name__

    @functools.wraps(reference)
    def call(*args: P.args, **kwargs: P.kwargs) -> None:
        if _implementation is None:
            _use_library()
        getattr(_implementation, name)(*args, **kwargs)

    declared = cast("Operator[P]", call)
    declared.reference = reference
    OPERATORS[name] = declared
    return declared


@contextmanager
def implemented_by(implementation: Any) -> Iterator[None]:
    """Within the block, calls of operators go to the attributes of an object with their names.

    For the whole process, so not beside an engine that runs in another thread.
    """
    global _implementation
    before, _implementation = _implementation, implementation
    try:
        yield
    finally:
        _implementation = before


@contextmanager
def reference_operators() -> Iterator[None]:
    """Within the block, operators run their own bodies, as `implemented_by` for all of them."""
    bodies = {name: operator.reference for name, operator in OPERATORS.items()}
    with implemented_by(SimpleNamespace(**bodies)):
        yield


@functools.cache
def operators() -> Any:
    """The namespace torch.ops.ems_vllm, with the library loaded and the fakes registered.

    Raises:
        ImportError: the library was not built, or this torch cannot load it.
    """
    if not _LIBRARY.exists():
        raise ImportError(
            f"The ems_vllm operators are not built: {_LIBRARY} does not exist. "
            "Run `make build` in the repository, or install a wheel of ems-vllm."
        )
    try:
        torch.ops.load_library(str(_LIBRARY))
    except OSError as error:
        raise ImportError(
            f"torch {torch.__version__} cannot load {_LIBRARY}. The library needs torch 2.10 or "
            "newer; run `make build` to build it for this environment."
        ) from error
    for name in OPERATORS:
        torch.library.register_fake(f"ems_vllm::{name}", _mutates_only)
    return torch.ops.ems_vllm


def _use_library() -> None:
    global _implementation
    _implementation = operators()


def _mutates_only(*args: object, **kwargs: object) -> None:
    """Nothing to infer: no operator returns a tensor."""
