# SPDX-License-Identifier: Apache-2.0
"""What the machine reaches at best, measured: the denominators of every fraction."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from opbench.timing import Timer


@dataclass(frozen=True)
class Ceilings:
    """Measured rates.

    Attributes:
        copy_bytes_per_s: Of a large copy, bytes read plus bytes written.
        matmul_flops_per_s: Of a large product in the benchmark's dtype, on random numbers.
    """

    copy_bytes_per_s: float
    matmul_flops_per_s: float


def measure(timer: Timer, device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Both rates of a device."""
    return Ceilings(_copy_rate(timer, device), _matmul_rate(timer, device, dtype))


def _copy_rate(timer: Timer, device: torch.device) -> float:
    num_bytes = 1 << (32 if device.type == "cuda" else 26)
    source = torch.empty(num_bytes, dtype=torch.int8, device=device).random_(0, 100)
    target = torch.empty_like(source)
    return 2e3 * num_bytes / timer(lambda: target.copy_(source)).p50_ms


def _matmul_rate(timer: Timer, device: torch.device, dtype: torch.dtype) -> float:
    size = 8192 if device.type == "cuda" else 512
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2e3 * size**3 / timer(lambda: left @ right).p50_ms
