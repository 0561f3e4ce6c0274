# SPDX-License-Identifier: Apache-2.0
"""Loads the shared library that registers the operators with torch, on first use."""

import functools
from pathlib import Path
from types import ModuleType

import torch

from ems_vllm.ops import fake

_LIBRARY = Path(__file__).resolve().parent.parent / "_ops.abi3.so"


@functools.cache
def operators() -> ModuleType:
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
    fake.register()
    return torch.ops.ems_vllm
