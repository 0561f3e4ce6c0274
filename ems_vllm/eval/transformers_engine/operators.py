# SPDX-License-Identifier: Apache-2.0
"""Which implementation of the operators the policies call."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ems_vllm import ops
from ems_vllm.ops import reference


@contextmanager
def reference_operators() -> Iterator[None]:
    """Within the block, policies compute with `ems_vllm.ops.reference` on any device.

    For the whole process, so not beside an engine that runs in another thread.
    """
    compiled = {name: getattr(ops, name) for name in reference.__all__}
    try:
        for name in compiled:
            setattr(ops, name, getattr(reference, name))
        yield
    finally:
        for name, operator in compiled.items():
            setattr(ops, name, operator)
