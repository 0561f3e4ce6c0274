# SPDX-License-Identifier: Apache-2.0
"""From an answer to a score, by the task that asked."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ems_vllm.config.errors import ConfigError
from ems_vllm.eval.questions.sample import Sample
from ems_vllm.eval.questions.tasks import TASKS
from ems_vllm.eval.records.following import Followed


def score_output(sample: Sample, output: str) -> float:
    """Quality of a generated answer, in [0, 1]."""
    try:
        task = TASKS.get(sample.task)
    except KeyError as error:
        raise ConfigError(f"tasks={sample.task!r} is not a task: {error.args[0]}.") from None
    return task.score(sample, output)


def score_continuation(sample: Sample, logprobs: Sequence[float]) -> float:
    """Bits per byte of the continuation.

    Args:
        sample: Its continuation was predicted.
        logprobs: Natural logarithms, one for each of its tokens.
    """
    if len(logprobs) != len(sample.continuation_token_ids):
        raise ConfigError(
            f"logprobs of task={sample.task!r} length={sample.length} seed={sample.seed} "
            f"index={sample.index} has {len(logprobs)} values: give one for each of the "
            f"{len(sample.continuation_token_ids)} tokens of the continuation."
        )
    return -sum(logprobs) / math.log(2) / sample.continuation_bytes


def score_followed(sample: Sample, followed: Followed | None) -> float:
    """Share before the first divergence, or nats per token, as the task says."""
    if followed is None:
        raise ConfigError(
            f"followed of task={sample.task!r} length={sample.length} seed={sample.seed} "
            f"index={sample.index} is missing: say how the full cache's answer is followed."
        )
    return followed.kl if TASKS.get(sample.task).metric == "kl" else followed.agreement
