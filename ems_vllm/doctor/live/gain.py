# SPDX-License-Identifier: Apache-2.0
"""What compression would free of a pool, by the lengths of the requests that were seen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ems_vllm.capacity import RequestColumns, request_columns
from ems_vllm.config.schema import KVCompressionConfig
from ems_vllm.doctor.live.lengths import Lengths
from ems_vllm.doctor.live.pool import Pool


@dataclass(frozen=True)
class Gain:
    """By arithmetic, every layer being compressed.

    Attributes:
        recipe, size: Of the settings that were taken, in words.
        compressed_share: Of the requests, those that would be compressed at all.
        dense_blocks: Of a request at its end, in the mean.
        compressed_blocks: Of the same, at most once its prompt is compressed.
        freed_share: Of the blocks that requests hold.
        dense_fit, compressed_fit: Requests that fit, all engines together; of the compressed ones
            an engine has one whose prompt is still coming in.
    """

    recipe: str
    size: str
    compressed_share: float
    dense_blocks: float
    compressed_blocks: float
    freed_share: float
    dense_fit: int
    compressed_fit: int


def gain(config: KVCompressionConfig, lengths: Lengths, pool: Pool, num_engines: int) -> Gain:
    """What would be held of requests of such lengths.

    Args:
        config: Settings, as they would be served with.
        lengths: Of the requests.
        pool: Of each engine.
        num_engines: Of the server.
    """
    generated = round(lengths.generated_mean)
    of_lengths = [
        (request_columns(config.plan_settings, length, generated, pool.block_size), count)
        for length, count in lengths.prompts
    ]
    total = sum(count for _, count in of_lengths)

    def mean(of_request: Callable[[RequestColumns], float]) -> float:
        return sum(of_request(columns) * count for columns, count in of_lengths) / total

    dense, compressed = mean(lambda one: one.dense), mean(lambda one: one.at_most)
    dense_fit = fit = int(pool.num_blocks / dense)
    if compressed < dense:
        beside = pool.num_blocks - mean(lambda one: one.coming_in)
        fit = 0 if beside < 0 else 1 + int(beside / compressed)
    return Gain(
        recipe=config.recipe,
        size=_size(config),
        compressed_share=mean(lambda one: float(one.at_most < one.dense)),
        dense_blocks=dense,
        compressed_blocks=compressed,
        freed_share=1 - compressed / dense,
        dense_fit=num_engines * dense_fit,
        compressed_fit=num_engines * fit,
    )


def _size(config: KVCompressionConfig) -> str:
    if config.budget is not None:
        return f"budget of {config.budget:,}"
    return f"ratio of {config.ratio:g}"
