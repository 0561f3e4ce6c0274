# SPDX-License-Identifier: Apache-2.0
"""Small integer tensors from host lists to the device, without a synchronisation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch


def to_device(
    values: Sequence[int] | np.ndarray, device: torch.device, dtype: torch.dtype = torch.int32
) -> torch.Tensor:
    """[len(values)]: a fresh tensor; PyTorch recycles the pinned staging memory when it is safe."""
    host = torch.tensor(values, dtype=dtype)
    if device.type == "cuda":
        # Not while it is made: torch pins no tensor that is made from an array.
        host = host.pin_memory()
    return host.to(device, non_blocking=True)


def pad_rows(
    rows: Sequence[Sequence[int]], device: torch.device, dtype: torch.dtype = torch.int32
) -> torch.Tensor:
    """[len(rows), longest]: rows padded with 0."""
    width = max((len(row) for row in rows), default=0)
    flat = [value for row in rows for value in (*row, *([0] * (width - len(row))))]
    return to_device(flat, device, dtype).view(len(rows), width)
