# SPDX-License-Identifier: Apache-2.0
"""From an answer to a score, by the task that asked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from ems_vllm.config.errors import ConfigError, shown
from ems_vllm.eval.questions.protocol import LAST
from ems_vllm.eval.questions.sample import Key, Sample
from ems_vllm.eval.questions.tasks import TASKS
from ems_vllm.eval.records.following import Followed
from ems_vllm.eval.records.prompt_files import AnswerLine, PromptLine, read
from ems_vllm.eval.records.results import EvalResult, MethodResult, SampleResult


def score_files(prompts: Path, answers: Path, *, model: str, method: MethodResult) -> EvalResult:
    """The result of another engine from its answers.

    Args:
        prompts: What prompt_files.export wrote.
        answers: One line for every prompt.
        model: Its name.
        method: What was run, without samples.

    Raises:
        ConfigError: an answer is missing, has no prompt, or comes twice.
    """
    given: dict[Key, AnswerLine] = {}
    for answer in read(answers, AnswerLine, "answers"):
        if answer.key in given:
            raise ConfigError(
                f"answers={shown(str(answers))} answers {_shown(answer.key)} twice: keep one line."
            )
        given[answer.key] = answer
    samples = []
    for line in read(prompts, PromptLine, "prompts"):
        found = given.pop(line.key, None)
        if found is None:
            raise ConfigError(
                f"answers={shown(str(answers))} has no answer to {_shown(line.key)}: answer every "
                "prompt, with an `error` where there is no output."
            )
        samples.append(scored(line.sample(), found))
    if given:
        raise ConfigError(
            f"answers={shown(str(answers))} answers {_shown(next(iter(given)))}, which "
            f"prompts={shown(str(prompts))} does not ask: give the file that was answered."
        )
    names = sorted({sample.task for sample in samples})
    return EvalResult(
        model=model,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        higher_is_better={name: TASKS.get(name).higher_is_better for name in names},
        methods=[method.model_copy(update={"samples": samples})],
    )


def scored(sample: Sample, answer: AnswerLine) -> SampleResult:
    """An answer with its score."""
    if answer.error is not None:
        score = 0.0
    elif sample.continuation_token_ids:
        score = score_continuation(sample, answer.logprobs or ())
    elif sample.follows_full:
        score = score_followed(sample, answer.followed)
    else:
        score = score_output(sample, answer.output)
    return SampleResult(
        task=sample.task,
        length=sample.length,
        depth=sample.depth,
        seed=sample.seed,
        index=sample.index,
        protocol=sample.protocol,
        score=score,
        followed=answer.followed,
        prompt_tokens=answer.prompt_tokens,
        output=answer.output,
        error=answer.error,
    )


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


def _shown(key: Key) -> str:
    place = f"task={key.task!r} length={key.length} seed={key.seed} index={key.index}"
    return place if key.protocol == LAST else f"{place} protocol={key.protocol!r}"
