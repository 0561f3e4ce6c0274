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
import os
import shlex
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from serving.report import write

from ems_vllm.config import parse_overrides
from ems_vllm.config.errors import ConfigError
from ems_vllm.eval import environment
from ems_vllm.eval.budget import Budget
from ems_vllm.eval.exchange import PromptLine
from ems_vllm.eval.reference.answer import Vocabulary, cut
from ems_vllm.eval.reference.files import read_prompts
from ems_vllm.eval.reference.methods import FULL, Method, methods, server_config
from ems_vllm.eval.scoring import score_output

BLOCK_SIZE = 16


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


def ask_vllm(
    questions: Sequence[Question],
    model: str,
    dtype: str,
    config: Any,
    vocabulary: Vocabulary,
) -> None:
    """Answers of one engine that compresses; full caches are asked for by request."""
    from vllm import LLM, SamplingParams
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    longest = max(len(q.prompt.prompt_token_ids) + q.prompt.max_tokens for q in questions)
    llm = LLM(
        model,
        dtype=dtype,
        max_model_len=longest,
        max_num_seqs=1,
        block_size=BLOCK_SIZE,
        num_gpu_blocks_override=4 * -(-longest // BLOCK_SIZE),
        additional_config={"kv_compression": config.to_dict()},
    )
    try:
        for question in questions:
            prompt = question.prompt
            options = question.method.options(prompt, config, BLOCK_SIZE)
            assert options is not None
            params = SamplingParams(
                max_tokens=prompt.max_tokens,
                temperature=0,
                extra_args={"kv_budget": options.budget}
                if options.enabled
                else {"kv_compression": "off"},
            )
            inputs = {"prompt_token_ids": list(prompt.prompt_token_ids)}
            (output,) = llm.generate([inputs], params, use_tqdm=False)
            text = vocabulary.decode(output.outputs[0].token_ids)
            question.answers["vllm"] = cut(text, prompt.stop)[0]
    finally:
        llm.llm_engine.engine_core.shutdown()
        cleanup_dist_env_and_memory()


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
        label = FULL if method.recipe == FULL else f"{method.recipe} {method.budget}"
        yield Row(label, len(mine), statistics.fmean(same), *scores.values())


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
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from ems_vllm.eval.reference.model import ReferenceModel, load_vocabulary
    from ems_vllm.eval.reference.runner import Runner

    described = {**environment.describe(), "transformers": version("transformers")}
    asked = [line for line in read_prompts(prompts)[:limit] if not line.continuation_token_ids]
    check_beginnings(asked, model)
    chosen = methods([FULL, recipe], [Budget.parse(text) for text in budget])
    overrides = parse_overrides(config)
    largest = max(m.budget.total(line.length) or 1 for m in chosen for line in asked)
    settings = server_config(recipe, largest, overrides, BLOCK_SIZE)

    reference = ReferenceModel.load(model, "cpu", dtype, BLOCK_SIZE)
    runner = Runner(reference, model, chosen, asked, overrides, compiled=True)
    questions = []
    for prompt in asked:
        for method, line in runner.answers(prompt, chosen):
            questions.append(Question(prompt, method, {"transformers": line.output or ""}))
    ask_vllm(questions, model, dtype, settings, load_vocabulary(model, reference.model))

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
    try:
        typer.run(main)
    except ConfigError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
