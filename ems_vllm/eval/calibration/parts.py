# SPDX-License-Identifier: Apache-2.0
"""Samples that were measured before a calibration was cut off."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


class Parts:
    """A folder beside the profile, until the profile is written.

    Args:
        out: The profile.
        depends: All that a sample's measurement depends on, beside the sample; other settings are
            measured anew.
    """

    def __init__(self, out: Path, depends: dict[str, Any]) -> None:
        text = json.dumps(depends, sort_keys=True, default=str)
        self.folder = out.with_name(f"{out.name}.parts")
        self._digest = hashlib.sha256(text.encode()).hexdigest()[:16]

    def measured(
        self, index: int, measure: Callable[[], torch.Tensor | None]
    ) -> torch.Tensor | None:
        """What a sample showed, measured now if it was not before."""
        path = self.folder / f"{self._digest}-{index}.pt"
        if path.exists():
            found: torch.Tensor | None = torch.load(path, weights_only=True)
            return found
        found = measure()
        self.folder.mkdir(parents=True, exist_ok=True)
        # Whole or not at all.
        unfinished = path.with_suffix(".new")
        torch.save(found, unfinished)
        unfinished.rename(path)
        return found

    def remove(self) -> None:
        """All of them are in the profile."""
        shutil.rmtree(self.folder, ignore_errors=True)
