# SPDX-License-Identifier: Apache-2.0
"""What an evaluation leaves behind: one JSON file, read again by the report and by comparisons."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ems_vllm.eval.questions.protocol import LAST, Protocol
from ems_vllm.eval.records.following import Followed
from ems_vllm.eval.records.readable_json import readable

SCHEMA: Literal[1] = 1


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid")


class SampleResult(_Record):
    """One answer.

    Attributes:
        task: Name of the task.
        length: Nominal context length in tokens; a cell of the task's grid.
        depth: Where the needle lies, 0 (start) to 1 (end); None where a task has no depth.
        seed, index: Together with task, length and protocol they determine the prompt.
        protocol: Where the question stands; files without it are older than the others.
        score: Quality in [0, 1], by the task's own metric; bits per byte for perplexity tasks.
        followed: Of tasks whose reference is the full cache's answer.
        prompt_tokens: Tokens of the prompt as the server counted them.
        output: What the model answered.
        error: Why there is no answer; score is 0 then.
    """

    task: str
    length: int
    depth: float | None = None
    seed: int
    index: int
    protocol: Protocol = LAST
    score: float
    followed: Followed | None = None
    prompt_tokens: int | None = None
    output: str = ""
    error: str | None = None


class Serving(_Record):
    """Memory and speed while the samples ran; None where the server does not tell.

    Attributes:
        kv_bytes_per_request: Bytes of KV cache a request holds once its prompt is processed, over
            all layers, by the plan.
        blocks_per_request: Blocks of the same.
        peak_blocks: Most blocks in use at a time.
        ttft_s, tpot_s: Medians, in seconds.
        output_tokens_per_s: Of all requests together.
    """

    kv_bytes_per_request: float | None = None
    blocks_per_request: float | None = None
    peak_blocks: int | None = None
    ttft_s: float | None = None
    tpot_s: float | None = None
    output_tokens_per_s: float | None = None


class MethodResult(_Record):
    """One way of keeping the cache, at one budget.

    Attributes:
        method: "full", a recipe of this package, or a peer's method.
        engine: "vllm", or the peer library that ran it ("kvpress", "transformers").
        budget: Entries per kv_head, sinks and recent window included; None for the full cache.
        budget_fraction: The same as a fraction of the context length; None for the full cache.
        samples: In any order.
    """

    method: str
    engine: str = "vllm"
    budget: int | None = None
    budget_fraction: float | None = None
    settings: dict[str, Any] = {}
    samples: list[SampleResult] = []
    serving: Serving = Serving()

    @property
    def is_full(self) -> bool:
        return self.budget is None and self.budget_fraction is None


class EvalResult(_Record):
    """Everything that one run of the evaluation measured.

    Attributes:
        higher_is_better: By task; False for bits per byte.
        environment: Versions, hardware, commit.
    """

    schema_version: Annotated[Literal[1], Field(alias="schema")] = SCHEMA
    model: str
    preset: str | None = None
    created: str
    environment: dict[str, Any] = {}
    higher_is_better: dict[str, bool] = {}
    methods: list[MethodResult] = []

    @classmethod
    def read(cls, path: Path) -> EvalResult:
        return cls.model_validate_json(path.read_text(encoding="utf-8"))

    def write(self, path: Path) -> None:
        path.write_text(
            readable(json.loads(self.model_dump_json(by_alias=True, exclude_none=True))),
            encoding="utf-8",
        )
