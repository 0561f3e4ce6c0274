# SPDX-License-Identifier: Apache-2.0
"""Losses of right answers in another engine's answers, to be put beside an ablation's.

Usage: python -m ems_vllm.eval.lab.answers answers/kvpress-*.jsonl --prompts prompts.jsonl \\
    --full answers/kvpress-full.jsonl --engine "kvpress 0.5.5" --model NAME --out losses.json

They count the tokens that an ablation counts, and stand above the same engine's full cache, so
that what engines round differently does not count.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

import typer

from ems_vllm.config.errors import ConfigError, shown
from ems_vllm.eval.lab.forcing import Forced, group
from ems_vllm.eval.questions.sample import Key
from ems_vllm.eval.records.prompt_files import AnswerLine, PromptLine, read, read_prompts
from ems_vllm.eval.records.readable_json import readable
from ems_vllm.eval.script import run_script

# Loss of a prompt by its task, seed and index, by its group: nats per token.
Losses = dict[str, dict[str, float]]
_DIGITS = 4


@dataclass(frozen=True)
class AnswerLosses:
    """What methods of another engine lose.

    Attributes:
        model: Its name.
        engine: Name and version.
        what: What the numbers are.
        full: Of the full cache.
        losses: By method and budget as in the file's name: above the full cache's.
    """

    model: str
    engine: str
    what: str = (
        "loss of the right answer (continuation: of the text), nats per token, by teacher "
        "forcing, by protocol and task/seed/index; what the prompt itself predicts is left out. "
        "full: the full cache's; losses: what methods at budgets lose more than it"
    )
    full: Losses = field(default_factory=dict)
    losses: dict[str, Losses] = field(default_factory=dict)


def losses(prompts: Iterable[PromptLine], answers: Iterable[AnswerLine]) -> Losses:
    """Of the prompts whose answers are known and have been predicted; others are left out.

    Raises:
        ConfigError: two prompts differ in their lengths alone.
    """
    by_key = {answer.key: answer for answer in answers}
    found: Losses = {}
    for prompt in prompts:
        counted = _counted(prompt, by_key.get(prompt.key))
        if not counted:
            continue
        of_group = found.setdefault(group(prompt), {})
        name = _name(prompt.key)
        if name in of_group:
            raise ConfigError(
                f"prompts has {name} in two lengths: give the prompts of one length at a time."
            )
        of_group[name] = -sum(counted) / len(counted)
    return found


def above(some: Losses, full: Losses) -> Losses:
    """Losses above the full cache's, of prompts that both have."""
    return {
        name: {
            prompt: round(loss - full[name][prompt], _DIGITS)
            for prompt, loss in sorted(of_group.items())
            if prompt in full.get(name, {})
        }
        for name, of_group in some.items()
    }


def _counted(prompt: PromptLine, answer: AnswerLine | None) -> tuple[float, ...]:
    """Log probabilities of the tokens that a compressed cache predicts."""
    forced = Forced.of(prompt)
    if forced is None or answer is None:
        return ()
    logprobs = answer.logprobs if prompt.continuation_token_ids else answer.gold_logprobs
    return () if logprobs is None else logprobs[-len(forced.counted) :]


def _name(key: Key) -> str:
    return f"{key.task}/{key.seed}/{key.index}"


def main(
    answers: Annotated[list[Path], typer.Argument(help="Files of answers, one a method.")],
    prompts: Annotated[Path, typer.Option(help="What `eval --export-prompts` wrote.")],
    full: Annotated[Path, typer.Option(help="The full cache's answers.")],
    engine: Annotated[str, typer.Option(help="Name and version.")],
    model: Annotated[str, typer.Option(help="Its name.")],
    out: Annotated[Path, typer.Option(help="JSON file for the losses.")],
) -> None:
    """Losses of right answers in another engine's answers."""
    asked = read_prompts(prompts)
    of_full = losses(asked, read(full, AnswerLine, "full"))
    if not of_full:
        raise ConfigError(
            f"full={shown(str(full))} has no probabilities of right answers: have the engine "
            "force them (gold_logprobs, logprobs)."
        )
    # kvpress-full and kvpress-snapkv-0.06.
    prefix = full.stem.removesuffix("full")
    found = {
        path.stem.removeprefix(prefix): above(
            losses(asked, read(path, AnswerLine, "answers")), of_full
        )
        for path in sorted(answers)
        if path != full
    }
    rounded = {
        name: {prompt: round(loss, _DIGITS) for prompt, loss in sorted(of_group.items())}
        for name, of_group in of_full.items()
    }
    result = AnswerLosses(model=model, engine=engine, full=rounded, losses=found)
    out.write_text(readable(asdict(result)), encoding="utf-8")
    typer.echo(f"{len(found)} methods, {sum(map(len, of_full.values()))} prompts: {out}")


if __name__ == "__main__":
    run_script(main)
