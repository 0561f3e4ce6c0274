# SPDX-License-Identifier: Apache-2.0
"""Learning rate: warm-up, constant, linear decay whose begin may be set while training runs."""

from dataclasses import dataclass


@dataclass
class Schedule:
    """Factor on the peak rates.

    Attributes:
        warmup: Steps.
        begin: First step of the decay, or None as long as none is planned.
        length: Steps of the decay.
    """

    warmup: int
    begin: int | None = None
    length: int = 0

    def factor(self, step: int) -> float:
        rise = min(1.0, (step + 1) / self.warmup)
        if self.begin is None or step < self.begin:
            return rise
        return rise * max(0.0, 1 - (step - self.begin) / self.length)

    def finished(self, step: int) -> bool:
        return self.begin is not None and step >= self.begin + self.length
