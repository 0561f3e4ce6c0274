# SPDX-License-Identifier: Apache-2.0
"""What the lengths of the traffic say of a budget: arithmetic, nothing is measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from ems_vllm.advise.course import Course, course
from ems_vllm.advise.pool import Pool
from ems_vllm.advise.quantiles import quantile
from ems_vllm.advise.replay import Speed, replay
from ems_vllm.advise.report import Arrivals, ByLength
from ems_vllm.advise.traffic import Request
from ems_vllm.plan import PlanSettings


def by_length(
    settings: PlanSettings | None,
    requests: Sequence[Request],
    block_size: int,
    column_bytes: int,
    pool: Pool | None,
    speed: Speed,
) -> ByLength:
    """The figures of one budget.

    Args:
        settings: Of a server with it; None for dense.
        requests: At least one, by arrival.
        block_size: Tokens per block.
        column_bytes: Of a block over all layers.
        pool: That they share; None where it is not known.
        speed: For a replay of the arrivals, where there are any.
    """
    courses = _courses(settings, requests, block_size)
    dense = courses if settings is None else _courses(None, requests, block_size)
    blocks = [one.most for one in courses]
    coming_in = [one.coming_in for one in courses]
    compressed = [
        (one.kept, request.prompt_len)
        for one, request in zip(courses, requests, strict=True)
        if one.compressed
    ]
    read_dense = sum(one.read for one in dense)
    mean = sum(blocks) / len(blocks)
    fitting = None
    if pool is not None:
        fitting = [
            pair
            for pair in zip(requests, courses, strict=True)
            if max(pair[1].coming_in, pair[1].most) <= pool.columns
        ]
    return ByLength(
        compressed_share=len(compressed) / len(courses),
        blocks_mean=mean,
        blocks_p50=quantile(blocks, 0.5),
        blocks_p95=quantile(blocks, 0.95),
        blocks_held=_held(list(zip(requests, courses, strict=True))),
        coming_in_p95=quantile(coming_in, 0.95),
        coming_in_max=max(coming_in),
        mib_mean=mean * column_bytes / 2**20,
        kept_share=(
            sum(kept for kept, _ in compressed) / sum(length for _, length in compressed)
            if compressed
            else None
        ),
        read_share=sum(one.read for one in courses) / read_dense if read_dense else 1.0,
        fit=None if pool is None or fitting is None else _fit(fitting, pool),
        never_fit=None if fitting is None else len(courses) - len(fitting),
        arrivals=None if pool is None or fitting is None else _arrivals(fitting, pool, speed),
    )


def _courses(
    settings: PlanSettings | None, requests: Sequence[Request], block_size: int
) -> list[Course]:
    """Many requests are of the same lengths."""
    known: dict[tuple[int, int], Course] = {}
    found = []
    for request in requests:
        lengths = (request.prompt_len, request.output_len)
        if lengths not in known:
            known[lengths] = course(settings, *lengths, block_size)
        found.append(known[lengths])
    return found


def _held(pairs: Sequence[tuple[Request, Course]]) -> float:
    """Columns of a request that is met at any generated token: long answers are met more often."""
    tokens = sum(request.output_len for request, _ in pairs)
    if not tokens:
        return sum(one.coming_in for _, one in pairs) / len(pairs)
    return sum(request.output_len * one.mean for request, one in pairs) / tokens


def _fit(pairs: Sequence[tuple[Request, Course]], pool: Pool) -> int:
    """Requests of the mix that run at a time, one of which has its prompt still coming in."""
    if not pairs:
        return 0
    beside = pool.columns - sum(one.coming_in for _, one in pairs) / len(pairs)
    fit = 1 + int(max(0.0, beside) // _held(pairs))
    return fit if pool.max_num_seqs is None else min(fit, pool.max_num_seqs)


def _arrivals(pairs: Sequence[tuple[Request, Course]], pool: Pool, speed: Speed) -> Arrivals | None:
    if any(request.arrival is None for request, _ in pairs):
        return None
    found = replay(
        [
            (request.arrival or 0.0, request.prompt_len, request.output_len, one)
            for request, one in pairs
        ],
        pool.columns,
        speed,
        pool.max_num_seqs,
    )
    return None if found is None else Arrivals(**asdict(found))
