# SPDX-License-Identifier: Apache-2.0
"""Whether compression will help a server, in sentences, and what else would."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from ems_vllm.doctor.live.compressing import Compressing
from ems_vllm.doctor.live.gain import Gain
from ems_vllm.doctor.live.regime import FULL, QUIET, Regime
from ems_vllm.doctor.live.traffic import Traffic

# Share of the blocks that must come free for compression to be worth its while (ours).
WORTH = 0.1


class Helps(StrEnum):
    """Whether compression will help.

    Attributes:
        YES: More requests would run at a time.
        NO: The cache is not what is short, or nothing would be compressed.
        ON: The server compresses already.
        UNKNOWN: Nothing was seen that tells.
    """

    YES = "yes"
    NO = "no"
    ON = "on"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Advice:
    """What to do.

    Attributes:
        helps: Whether compression will.
        sentences: What was found, what it means for compression, and what to do.
    """

    helps: Helps
    sentences: tuple[str, ...]


def advice(
    found: Regime, traffic: Traffic, gain: Gain | None, compressing: Compressing | None
) -> Advice:
    """What was found, in words.

    Args:
        found: What limits the server.
        traffic: Of the server.
        gain: What compression would free; None where lengths or pool are not known.
        compressing: What a server that compresses says; None for one that does not.
    """
    sentences = [_FOUND[found]]
    if compressing is not None:
        return Advice(Helps.ON, (*sentences, *_of_compressing(found, compressing)))
    if gain is None or traffic.lengths is None:
        return Advice(
            Helps.UNKNOWN,
            (*sentences, "No request has ended yet, so their lengths are not known: ask again."),
        )
    if traffic.lengths.since_start and found not in QUIET:
        sentences.append(_NONE_ENDED.format(lengths=traffic.lengths))
    if traffic.pool is not None and not traffic.pool.is_uniform:
        sentences.append(_SEVERAL_KINDS)
    if gain.freed_share < WORTH:
        return Advice(Helps.NO, (*sentences, _too_short(traffic, gain), *_instead(found)))
    if found in FULL:
        return Advice(Helps.YES, (*sentences, _more_fit(gain), _START.format(gain=gain)))
    if found in QUIET:
        told = f"{_more_fit(gain)} Whether they are needed, only load tells: ask again under it."
        return Advice(Helps.UNKNOWN, (*sentences, told))
    return Advice(Helps.NO, (*sentences, _NOT_SHORT[found].format(gain=gain), *_instead(found)))


_FOUND = {
    Regime.ASLEEP: "The server sleeps: wake it up, and ask again under load.",
    Regime.IDLE: "The server is idle: nothing limits it.",
    Regime.PREEMPTING: (
        "The pool is too small: running requests lose their blocks and are computed again."
    ),
    Regime.KV_BOUND: "The pool is full, and requests wait for blocks.",
    Regime.PREFILL_BOUND: "Prompts take most of the time; the pool is not what limits.",
    Regime.COMPUTE_BOUND: (
        "Requests wait although blocks are free: the number of requests or tokens of a step limits."
    ),
    Regime.ROOM: "Nothing limits: all requests run, and blocks are free.",
}
_NONE_ENDED = (
    "No request ended while the server was watched: what follows rests on the "
    "{lengths.num_requests:,} that ended before, which may have been of another kind; watch it "
    "longer with --seconds."
)
_SEVERAL_KINDS = (
    "Layers of this model differ in kind: what follows takes all of them to be compressed, and "
    "`ems-vllm doctor MODEL` says which are."
)
_START = (
    "Start it with --kv-compression {gain.recipe}; `ems-vllm doctor MODEL` says beforehand whether "
    "it can."
)
_NOT_SHORT = {
    Regime.PREFILL_BOUND: (
        "Compression will not help: it would free {gain.freed_share:.0%} of the blocks, and nobody "
        "waits for them, while scoring makes prompts a few per cent slower."
    ),
    Regime.COMPUTE_BOUND: (
        "Compression will not admit more requests: it would free {gain.freed_share:.0%} of the "
        "blocks, and nobody waits for them. Steps would read less, which nobody has measured on a "
        "GPU yet."
    ),
    Regime.ROOM: (
        "Compression will not admit more requests: it would free {gain.freed_share:.0%} of the "
        "blocks, and nobody waits for them. Steps would read less, which nobody has measured on a "
        "GPU yet. Ask again under the load that you expect."
    ),
}
_INSTEAD = {
    Regime.PREEMPTING: (
        "What does help: more memory for the pool (--gpu-memory-utilization, more GPUs), "
        "--kv-cache-dtype fp8, or a lower --max-num-seqs."
    ),
    Regime.KV_BOUND: (
        "What does help: more memory for the pool (--gpu-memory-utilization, more GPUs), or "
        "--kv-cache-dtype fp8."
    ),
    Regime.PREFILL_BOUND: (
        "What does help: prompts that begin alike, for the prefix cache; a higher "
        "--max-num-batched-tokens; more GPUs."
    ),
    Regime.COMPUTE_BOUND: (
        "What does help: a higher --max-num-seqs or --max-num-batched-tokens, until the pool is "
        "full; then more GPUs."
    ),
}


def _instead(found: Regime) -> Iterator[str]:
    if found in _INSTEAD:
        yield _INSTEAD[found]


def _too_short(traffic: Traffic, gain: Gain) -> str:
    lengths = traffic.lengths
    assert lengths is not None
    seen = (
        f"prompts of {lengths.prompt_mean:,.0f} tokens and answers of "
        f"{lengths.generated_mean:,.0f}, in the mean"
    )
    if not gain.compressed_share:
        return (
            f"Compression will not help: {seen}, do not grow far enough beyond the {gain.size}: "
            "nothing would be compressed."
        )
    return (
        f"Compression will hardly help: {seen}; with a {gain.size} it would compress "
        f"{gain.compressed_share:.0%} of the requests, and free {gain.freed_share:.0%} of the "
        "blocks."
    )


def _more_fit(gain: Gain) -> str:
    return (
        f"Compression would free {gain.freed_share:.0%} of the blocks that requests hold (a "
        f"{gain.size}): about {gain.compressed_fit:,} requests fit where {gain.dense_fit:,} do "
        "dense."
    )


def _of_compressing(found: Regime, compressing: Compressing) -> Iterator[str]:
    reason = compressing.why_nothing()
    if reason is not None:
        yield f"Compression is on, but nothing was compressed so far: {reason}."
        if found in FULL:
            yield f"A smaller budget compresses more. {_INSTEAD[found]}"
        return
    done = [f"{compressing.compactions:,} compactions"]
    if compressing.kept_share is not None:
        done.append(f"{compressing.kept_share:.0%} of what they found was kept")
    if compressing.live_share is not None:
        done.append(f"running requests hold {compressing.live_share:.0%} of their dense blocks")
    yield f"Compression is on and works: {', '.join(done)}."
    if found in FULL:
        yield (
            "The pool is full all the same: a smaller budget, or a prefill_interval where prompts "
            f"fill it, frees more. {_INSTEAD[found]}"
        )
    else:
        yield from _instead(found)
