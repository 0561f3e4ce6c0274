# SPDX-License-Identifier: Apache-2.0
"""What `ems-vllm doctor --url` prints: its schema, and how it is made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from ems_vllm.config.schema import KVCompressionConfig
from ems_vllm.doctor.live.advice import WORTH, Helps, advice
from ems_vllm.doctor.live.compressing import compressing
from ems_vllm.doctor.live.gain import gain
from ems_vllm.doctor.live.reading import Reading
from ems_vllm.doctor.live.regime import THRESHOLDS, Regime, regime
from ems_vllm.doctor.live.traffic import traffic


class LiveReport(BaseModel):
    """Of a running server.

    Attributes:
        schema_version: Raised when a field changes its meaning or goes.
        url: As it was given.
        regime: What limits the server.
        helps: Whether compression will help.
        sentences: The same in words, and what to do.
        traffic: What was seen, as live/traffic.py describes it.
        gain: What compression would free, as live/gain.py describes it; None where lengths or
            pool are not known, or the server compresses already.
        compressing: What the server says of its compression, as live/compressing.py describes it.
        thresholds: By which the regime and the advice were decided.
    """

    model_config = ConfigDict(frozen=True)

    schema_version: Literal[1] = 1
    url: str
    regime: Regime
    helps: Helps
    sentences: tuple[str, ...]
    traffic: dict[str, Any]
    gain: dict[str, Any] | None
    compressing: dict[str, Any] | None
    thresholds: dict[str, float]


def live_report(url: str, readings: Sequence[Reading], config: KVCompressionConfig) -> LiveReport:
    """From several readings of one server.

    Args:
        url: Of the server.
        readings: Two or more, in order.
        config: With which the gain is reckoned.

    Raises:
        ConfigError: the server was started again in between.
    """
    seen = traffic(readings)
    ours = compressing([reading.page for reading in readings], seen)
    would = None
    if ours is None and seen.lengths is not None and seen.pool is not None:
        would = gain(config, seen.lengths, seen.pool, seen.num_engines)
    found = regime(seen)
    told = advice(found, seen, would, ours)
    return LiveReport(
        url=url,
        regime=found,
        helps=told.helps,
        sentences=told.sentences,
        traffic=asdict(seen),
        gain=None if would is None else asdict(would),
        compressing=None if ours is None else asdict(ours),
        thresholds={**THRESHOLDS, "worth": WORTH},
    )
