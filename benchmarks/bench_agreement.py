# SPDX-License-Identifier: Apache-2.0
"""Whether vLLM's engine and the one on transformers give the same answers under compression.

Usage: ems-vllm eval MODEL --preset tiny --lengths 1024 --samples 12 --export-prompts prompts.jsonl
       python benchmarks/bench_agreement.py --model MODEL --prompts prompts.jsonl \\
           --budget 0.06 --budget 0.25 --dtype bfloat16

Both compute the same in another order, so they part where two tokens are about equally likely:
often in bfloat16, seldom in float32. The row "full" shows how often that happens without
compression; an engine that lost something would agree less often than that in the other rows.
"""

import json
import shlex
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any

import offline
import typer
from offline import BLOCK_SIZE
from rich.console import Console
from rich.table import Table
from serving.report import write

from ems_vllm.config import RequestOptions, parse_overrides
from ems_vllm.config.errors import ConfigError
from ems_vllm.eval.records import environment
from ems_vllm.eval.records.budget import Budget
from ems_vllm.eval.records.method import FULL, TRANSFORMERS, Method, methods_of
from ems_vllm.eval.records.prompt_files import PromptLine, read_prompts
from ems_vllm.eval.records.scoring import score_output
from ems_vllm.eval.script import run_script
from ems_vllm.eval.transformers_engine.answer import Vocabulary, cut
from ems_vllm.eval.transformers_engine.server_config import request_options, server_config


@dataclass(frozen=True)
class Row:
    """One method.

    Attributes:
        same: Share of prompts whose two answers are the same text.
        score_vllm, score_transformers: Mean score of the task.
    """

    method: str
    num_prompts: int
    same: float
    score_vllm: float
    score_transformers: float


@dataclass
class Question:
    """A prompt under a method, and what the engines said."""

    prompt: PromptLine
    method: Method
    answers: dict[str, str]


def sampling(prompt: PromptLine, options: RequestOptions) -> dict[str, Any]:
    """Arguments of vLLM's SamplingParams: what is written after the prompt is prescribed."""
    extra: dict[str, Any] = {"kv_compression": "off"}
    if options.enabled:
        extra = {"kv_budget": options.budget}
    written = list(prompt.written_token_ids)
    if written:
        extra["forced_token_ids"] = written
    return {
        "max_tokens": len(written) + prompt.max_tokens,
        "temperature": 0,
        # A chat template ends the user's turn with a token that would end the answer too.
        "ignore_eos": bool(written),
        "extra_args": extra,
    }


def answer(prompt: PromptLine, token_ids: Sequence[int], vocabulary: Vocabulary) -> str:
    """The text of an answer that was generated under `sampling`."""
    written = len(prompt.written_token_ids)
    if tuple(token_ids[:written]) != prompt.written_token_ids:
        raise ValueError("the engine did not write what was prescribed")
    free = takewhile(lambda token: token not in vocabulary.eos_token_ids, token_ids[written:])
    return cut(vocabulary.decode(list(free)), prompt.stop)[0]


def ask_vllm(
    questions: Sequence[Question],
    model: str,
    dtype: str,
    config: Any,
    vocabulary: Vocabulary,
) -> None:
    """Answers of one engine that compresses; full caches are asked for by request."""
    longest = max(
        len(q.prompt.prompt_token_ids) + len(q.prompt.written_token_ids) + q.prompt.max_tokens
        for q in questions
    )
    compression = {"kv_compression": config.to_dict()}
    with offline.engine(model, dtype=dtype, longest=longest, additional_config=compression) as llm:
        from vllm import SamplingParams

        for question in questions:
            options = request_options(question.method, question.prompt, config, BLOCK_SIZE)
            assert options is not None
            inputs = {"prompt_token_ids": list(question.prompt.prompt_token_ids)}
            params = SamplingParams(**sampling(question.prompt, options))
            (output,) = llm.generate([inputs], params, use_tqdm=False)
            question.answers["vllm"] = answer(
                question.prompt, output.outputs[0].token_ids, vocabulary
            )


def rows(questions: Sequence[Question]) -> Iterator[Row]:
    """What of the answers agrees, method by method."""
    for method in dict.fromkeys(question.method for question in questions):
        mine = [question for question in questions if question.method == method]
        scores = {
            name: statistics.fmean(
                score_output(question.prompt.sample(), question.answers[name]) for question in mine
            )
            for name in ("vllm", "transformers")
        }
        same = [question.answers["vllm"] == question.answers["transformers"] for question in mine]
        yield Row(str(method), len(mine), statistics.fmean(same), *scores.values())


def check_beginnings(prompts: Sequence[PromptLine], model: str) -> None:
    """Models that need a token at the beginning answer nonsense without.

    Raises:
        ConfigError: the tokenizer begins texts with a token that a prompt lacks.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    start = tokenizer("a").input_ids[:1]
    if start == [tokenizer.bos_token_id]:
        for prompt in prompts:
            if list(prompt.prompt_token_ids[:1]) != start:
                raise ConfigError(
                    f"prompts has one that begins with token {prompt.prompt_token_ids[0]}: put "
                    f"{tokenizer.bos_token!r} ({start[0]}) before it, as the model needs it."
                )


def main(
    model: Annotated[str, typer.Option(help="Model folder.")],
    prompts: Annotated[Path, typer.Option(help="What `eval --export-prompts` wrote.")],
    budget: Annotated[list[str], typer.Option(help="As for the evaluation.")],
    recipe: Annotated[str, typer.Option(help="Recipe or YAML file.")] = "ems",
    dtype: Annotated[str, typer.Option(help="Of the model.")] = "bfloat16",
    config: Annotated[str, typer.Option(help="Further settings, JSON.")] = "{}",
    limit: Annotated[int | None, typer.Option(min=1, help="First prompts only.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the report here, JSON.")] = None,
) -> None:
    """Whether vLLM's engine and the one on transformers give the same answers."""
    from ems_vllm.eval.transformers_engine.engine import TransformersEngine, load_vocabulary
    from ems_vllm.eval.transformers_engine.runner import Runner

    described = {**environment.describe(), "transformers": version("transformers")}
    lines = read_prompts(prompts)[:limit]
    asked = [line for line in lines if not (line.continuation_token_ids or line.follows_full)]
    check_beginnings(asked, model)
    chosen = methods_of([FULL, recipe], [Budget.parse(text) for text in budget], TRANSFORMERS)
    overrides = parse_overrides(config)
    largest = max(m.budget.total(line.length) or 1 for m in chosen for line in asked)
    settings = server_config(recipe, largest, overrides, BLOCK_SIZE)

    engine = TransformersEngine.load(model, "cpu", dtype, BLOCK_SIZE)
    runner = Runner(engine, model, chosen, asked, overrides, compiled=True)
    questions = []
    for prompt in asked:
        for method, line in runner.answers(prompt, chosen):
            questions.append(Question(prompt, method, {"transformers": line.output or ""}))
    ask_vllm(questions, model, dtype, settings, load_vocabulary(model, engine.model))

    found = list(rows(questions))
    table = Table(title=f"{Path(model).name}, {dtype}, {len(asked)} prompts")
    for label in ("", "prompts", "same answer", "score, vLLM", "score, transformers"):
        table.add_column(label, justify="right")
    for row in found:
        scores = (f"{row.score_vllm:.2f}", f"{row.score_transformers:.2f}")
        table.add_row(row.method, str(row.num_prompts), f"{row.same:.0%}", *scores)
    Console().print(table)
    if out is not None:
        report = {
            "command": shlex.join(["python", *sys.argv]).replace(model, Path(model).name),
            "environment": described,
            "model": Path(model).name,
            "dtype": dtype,
            "settings": json.loads(json.dumps(settings.to_dict())),
            "prompt_tokens": [len(line.prompt_token_ids) for line in asked],
            "methods": [asdict(row) for row in found],
        }
        write(out, report)


if __name__ == "__main__":
    run_script(main)
