# SPDX-License-Identifier: Apache-2.0
"""What the status routes answer."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field


class Capacity(BaseModel):
    """Requests of one length, by arithmetic, once their prompts are over."""

    num_tokens: int = Field(description="Length of a request.")
    dense_blocks: int = Field(description="Blocks that it holds without compression.")
    compressed_blocks: int = Field(description="Blocks that it holds at most, compressed.")
    dense_requests: float = Field(description="How many fit an engine's pool without compression.")
    compressed_requests: float = Field(description="How many fit, compressed.")


class Now(BaseModel):
    """Numbers of /metrics, of all engines together; counted since the start."""

    requests_running: int
    requests_waiting: int
    preemptions: int
    blocks: int = Field(description="Of the pools.")
    blocks_held: int
    blocks_saved: int
    kv_bytes_saved: int
    kv_bytes_freed: int
    compactions: int
    entries_in: float
    entries_kept: float
    entries_merged: float
    entries_evicted: float
    preemptions_avoided: int
    compaction_seconds: float
    requests_by_outcome: dict[str, int]
    requests_refused: dict[str, int]

    @property
    def live_ratio(self) -> float | None:
        """Blocks held, of those that would be without compression; None for none."""
        dense = self.blocks_held + self.blocks_saved
        return self.blocks_held / dense if dense else None


class Memory(BaseModel):
    """Bytes beside the cache, on each device."""

    score_bytes: int
    query_bytes: int
    workspace_bytes: int


class Status(BaseModel):
    """A server."""

    model: str
    recipe: str = Field(description='"off" where nothing is compressed.')
    version: str = Field(description="Of ems-vllm.")
    vllm_version: str
    num_engines: int = 1
    num_layers: int = 0
    num_layers_compressed: int = 0
    inspects_requests: bool = Field(default=False, description="Whether requests are remembered.")
    shows_text: bool = False
    settings: dict[str, Any] = Field(default={}, description="In force, defaults included.")
    now: Now | None = Field(
        default=None, description="None where metrics are off, or nothing ran yet."
    )
    memory: Memory | None = None
    capacity: list[Capacity] = Field(
        default=[], description="Empty where some layers are not compressed: see the start-up log."
    )


class RequestSummary(BaseModel):
    """A request that was compressed, as of its latest compaction."""

    request_id: str = Field(description="The engine's: the API's, and what was added to it.")
    prompt_tokens: int
    num_tokens: int
    num_entries: float = Field(description="Held by a kv_head, in the mean of all.")
    num_compactions: int
    is_running: bool


class HeadStrip(BaseModel):
    """What one kv_head holds."""

    layer: int
    kv_head: int
    counts: list[int] = Field(description="Entries held, by bin.")


class RequestDetail(RequestSummary):
    """The same, and where in its length entries are held."""

    bins: list[int] = Field(description="Positions: where each begins, and where the last ends.")
    heads: list[HeadStrip]
    text: list[str] | None = Field(
        default=None, description="Of the prompt, by bin; None unless the server has inspect_text."
    )


class Positions(BaseModel):
    """Of one kv_head: every position that its kept entries are of."""

    request_id: str
    layer: int
    kv_head: int
    positions: list[int] = Field(description="Ascending; those of the tail are not among them.")


class FailureDetail(BaseModel):
    """What vLLM says of an error."""

    message: str
    type: str
    param: str | None = None
    code: int


class Failure(BaseModel):
    """As the OpenAI API answers what it does not."""

    error: FailureDetail
