# SPDX-License-Identifier: Apache-2.0
"""What `ems-vllm advise` finds: the schema of its JSON."""

from __future__ import annotations

from enum import StrEnum
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True)


class Traffic(_Part):
    """The requests of the file.

    Attributes:
        num_requests, num_with_text: How many, and of how many the text is known.
        prompt_p50, prompt_p95, prompt_max: Tokens of prompts.
        output_p50, output_p95, output_max: Tokens of answers.
        outputs: By where the length of an answer comes from (recorded, max_tokens, assumed).
        seconds: From the first arrival to the last; None where the file has no times.
    """

    num_requests: int
    num_with_text: int
    prompt_p50: int
    prompt_p95: int
    prompt_max: int
    output_p50: int
    output_p95: int
    output_max: int
    outputs: dict[str, int]
    seconds: float | None


class PoolSize(_Part):
    """The pool that was reckoned with.

    Attributes:
        columns: Blocks that requests may hold.
        gib: Of all GPUs together.
        max_num_seqs: Requests at a time, at most; None: no limit.
    """

    columns: int
    gib: float
    max_num_seqs: int | None


class Arrivals(_Part):
    """A replay of the arrivals; times rest on assumed speeds. Fields as of replay.Replay."""

    running_mean: float
    running_most: int
    fullest: float
    blocked_share: float
    wait_mean: float
    wait_p95: float
    preemptions: int


class ByLength(_Part):
    """What the plan says of the requests' lengths: arithmetic.

    Attributes:
        compressed_share: Requests of which anything is compressed.
        blocks_mean, blocks_p50, blocks_p95: Blocks of a request at most, once its prompt is over.
        blocks_held: Blocks of a request that runs, in the mean over all generated tokens.
        coming_in_p95, coming_in_max: Blocks of a request while its prompt is processed.
        mib_mean: blocks_mean in MiB; None where the model's shape is not known.
        kept_share: Entries kept of the prompts that are compressed; None where none is.
        read_share: KV bytes that decoding steps read, as a share of what they read dense.
        fit: Requests of this mix that the pool holds at a time; None without a pool.
        never_fit: Requests that the pool cannot hold at all; None without a pool.
        arrivals: None where pool or times are not known.
    """

    compressed_share: float
    blocks_mean: float
    blocks_p50: float
    blocks_p95: float
    blocks_held: float
    coming_in_p95: float
    coming_in_max: float
    mib_mean: float
    kept_share: float | None
    read_share: float
    fit: int | None
    never_fit: int | None
    arrivals: Arrivals | None


class Quality(_Part):
    """How a budget's next tokens differ from the dense cache's, on the sample: measured.

    Attributes:
        kl_mean, kl_worst: Over the prompts, of the mean KL divergence over an answer's tokens;
            nats per token.
        kl: Of each prompt of the sample.
        same_top: Share of the tokens of which the most likely one is the same.
        num_above: Prompts above the threshold.
        above_at_most: Upper bound, with the sample's confidence, of the share of such requests that
            are above it.
    """

    kl_mean: float
    kl_worst: float
    kl: tuple[float, ...]
    same_top: float
    num_above: int
    above_at_most: float


class Sample(_Part):
    """The prompts that were run.

    Attributes:
        num_prompts: How many.
        num_eligible: Of how many they were drawn: those with text, within the length bound, that
            at least one of the budgets compresses.
        num_too_long: That were left out of those for their length.
        prompt_shortest, prompt_longest: Tokens, of the prompts from which they were drawn.
        num_tokens: Of an answer that are compared, at most.
        max_kl: The threshold, nats per token.
        confidence: Of the bounds.
        prompts_needed: With none above the threshold, for a bound at the tolerated share.
        seconds: That it took.
    """

    num_prompts: int
    num_eligible: int
    num_too_long: int
    prompt_shortest: int
    prompt_longest: int
    num_tokens: int
    max_kl: float
    confidence: float
    prompts_needed: int
    seconds: float


class Budget(_Part):
    """One of the budgets that were compared.

    Attributes:
        label: In words.
        settings: As of --kv-compression-config.
        by_length: Arithmetic.
        quality: Measured; None where it was not.
    """

    label: str
    settings: dict[str, Any]
    by_length: ByLength
    quality: Quality | None


class Verdict(StrEnum):
    """What is suggested.

    Attributes:
        COMPRESS: With a budget that was close enough on the sample.
        UNMEASURED: With a budget of which only the lengths are known.
        SHORT: Not to compress: it would free next to nothing.
        ROOM: Not to compress: the pool is never full.
        TOO_FAR: None of these budgets: each changes too much.
    """

    COMPRESS = "compress"
    UNMEASURED = "compress, not measured"
    SHORT = "do not compress: short"
    ROOM = "do not compress: room"
    TOO_FAR = "none of these budgets"


class Suggestion(_Part):
    """What to do.

    Attributes:
        verdict: In short.
        budget: Label of the budget that is suggested; None for none.
        sentences: Why, and what to bear in mind.
        command: To serve so.
    """

    verdict: Verdict
    budget: str | None
    sentences: tuple[str, ...]
    command: str


class AdviceReport(_Part):
    """All of it.

    Attributes:
        schema_version: Raised when a field changes its meaning or goes.
        model, recipe, prompts: As they were given.
        block_size: Tokens per block.
        traffic: What was read.
        pool: None where nothing was said of it.
        token_ms, prompt_rate: Assumed speeds of a replay; None where there is none.
        dense: Without compression.
        budgets: As they were compared, those that hold most first.
        sample: None where nothing was measured.
        why_no_quality: Then, why.
        suggestion: What to do.
        thresholds: By which that was decided.
    """

    schema_version: Literal[1] = 1
    model: str
    recipe: str
    prompts: str
    block_size: int
    traffic: Traffic
    pool: PoolSize | None
    token_ms: float | None
    prompt_rate: float | None
    dense: ByLength
    budgets: tuple[Budget, ...]
    sample: Sample | None
    why_no_quality: str | None
    suggestion: Suggestion
    thresholds: dict[str, float]
