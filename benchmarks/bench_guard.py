# SPDX-License-Identifier: Apache-2.0
"""What the guard measures, beside what is lost, and what measuring costs.

Usage: OMP_NUM_THREADS=1 python benchmarks/bench_guard.py --model models/smollm2 \\
           --out benchmarks/results/guard-cpu.json

Pieces of a real text are compressed, and answers prescribed: of `text` the text's own next tokens,
of `later` a sentence of the piece that is asked for after it was compressed. What is lost is their
mean negative log probability above that with the full cache.
"""

import os
import random
import shlex
import statistics
import sys
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import typer
from offline import engine
from rich.console import Console
from rich.table import Table
from serving.report import write

from ems_vllm.eval.records import environment

RECIPES = ("ems", "snapkv")
RATIOS = (0.06, 0.125, 0.25)
_TEXT = Path(__file__).resolve().parents[1] / "models/text/hound_of_the_baskervilles_1_2.txt"
_NAMES = ("Mortimer", "Stapleton", "Barrymore", "Lyons", "Frankland", "Selden", "Perkins", "Murphy")
_WORDS = ("lantern", "harbour", "orchard", "violin", "granite", "saddle", "thunder", "meadow")


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
        num_prompts: Of each kind.
        num_new_tokens: Of the text after a piece.
    """

    model: str
    dtype: str
    num_prompts: int
    prompt_len: int
    num_new_tokens: int
    repeats: int
    seed: int


@dataclass(frozen=True)
class Question:
    """A piece of text, and what is prescribed after it.

    Attributes:
        num_asked: Leading tokens of the answer that do not count.
    """

    kind: str
    prompt: list[int]
    answer: list[int]
    num_asked: int


def questions(settings: Settings, tokenizer: Any) -> list[Question]:
    """As many of each kind, of pieces that lie evenly in the text and overlap."""
    tokens = tokenizer.encode(_TEXT.read_text(encoding="utf-8"), add_special_tokens=False)
    length, num_new = settings.prompt_len, settings.num_new_tokens
    generator = random.Random(settings.seed)
    found = []
    for number in range(settings.num_prompts):
        first = number * (len(tokens) - length - num_new) // max(1, settings.num_prompts - 1)
        piece = tokens[first : first + length]
        # The first token is predicted before anything is compressed.
        after = tokens[first + length : first + length + num_new]
        found.append(Question("text", piece, after, 1))
        name, word = generator.choice(_NAMES), generator.choice(_WORDS)
        said = f" The code word of Mr. {name} is"
        asked = tokenizer.encode(f"\n\n{said}", add_special_tokens=False)
        told = tokenizer.encode(f"{said} {word}.", add_special_tokens=False)
        answer = tokenizer.encode(f" {word}", add_special_tokens=False)
        at = generator.randrange(length // 10, length - length // 5)
        prompt = [*piece[:at], *told, *piece[at : length - len(told)]]
        found.append(Question("later", prompt, [*asked, *answer], len(asked)))
    return found


class Asker:
    """Asks an engine that measures every request.

    Attributes:
        errors: By internal request id, the errors of its compaction.
    """

    def __init__(self, llm: Any) -> None:
        self._llm = llm
        self.scheduler = llm.llm_engine.engine_core.engine_core.scheduler
        self.guard = self.scheduler.planner._guard
        self.errors: dict[str, Any] = {}
        measured = self.guard.measured

        def noted(errors: Any) -> None:
            self.errors.update({error.req_id: error for error in errors})
            measured(errors)

        self.guard.measured = noted

    def losses(self, asked: list[Question], xargs: dict[str, Any]) -> list[tuple[float, Any]]:
        """By question, the loss of its answer, and the error, where it was compressed."""
        from vllm import SamplingParams

        self.errors.clear()
        outputs = self._llm.generate(
            [{"prompt_token_ids": one.prompt} for one in asked],
            [
                SamplingParams(
                    max_tokens=len(one.answer),
                    temperature=0,
                    ignore_eos=True,
                    logprobs=0,
                    extra_args={**xargs, "forced_token_ids": one.answer},
                )
                for one in asked
            ],
            use_tqdm=False,
        )
        found = []
        for one, output in zip(asked, outputs, strict=True):
            logprobs = [
                step[token].logprob
                for step, token in zip(output.outputs[0].logprobs, one.answer, strict=True)
            ]
            error = [e for key, e in self.errors.items() if key.split("-")[0] == output.request_id]
            found.append((-statistics.mean(logprobs[one.num_asked :]), error[0] if error else None))
        return found

    def compaction_seconds(self, asked: Question, is_measured: bool) -> float:
        """Of the compaction of one request."""
        accounts = self.scheduler.planner.accounts
        accounts.take_totals()
        with mock.patch.object(self.guard, "measures", return_value=is_measured):
            self.losses([asked], {})
        (seconds,) = accounts.take_totals().compaction_seconds
        return float(seconds)


def measure(settings: Settings, recipe: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """By question and ratio what was found; and what measuring takes."""
    compression = {"recipe": recipe, "ratio": max(RATIOS), "guard_share": 1.0}
    rows = []
    with engine(
        settings.model,
        dtype=settings.dtype,
        longest=settings.prompt_len + settings.num_new_tokens + 64,
        max_num_seqs=4,
        kv_cache_memory_bytes=2 << 30,
        additional_config={"kv_compression": compression},
    ) as llm:
        asker, asked = Asker(llm), questions(settings, llm.get_tokenizer())
        full = asker.losses(asked, {"kv_compression": "off"})
        for ratio in RATIOS:
            for one, (before, _), (after, error) in zip(
                asked, full, asker.losses(asked, {"kv_ratio": ratio}), strict=True
            ):
                rows.append(
                    {
                        "recipe": recipe,
                        "kind": one.kind,
                        "ratio": ratio,
                        "full_loss": round(before, 4),
                        "loss": round(after - before, 4),
                        "mean_error": round(error.mean, 4),
                        "worst_error": round(error.worst, 4),
                    }
                )
        seconds: dict[bool, list[float]] = {False: [], True: []}
        for turn in range(2 * settings.repeats):
            is_measured = turn % 2 == 1
            seconds[is_measured].append(asker.compaction_seconds(asked[0], is_measured))
    plain, measured = (statistics.median(seconds[key]) for key in (False, True))
    cost = {
        "recipe": recipe,
        "seconds": round(plain, 4),
        "seconds_measured": round(measured, 4),
        "ratio": round(measured / plain, 2),
    }
    return rows, cost


def main(
    model: Annotated[str, typer.Option(help="Folder of the model.")] = "models/smollm2",
    out: Annotated[Path | None, typer.Option(help="JSON file for the figures.")] = None,
    dtype: Annotated[str, typer.Option(help="Of weights and cache.")] = "bfloat16",
    num_prompts: Annotated[int, typer.Option(min=1, help="Of each kind.")] = 12,
    prompt_len: Annotated[int, typer.Option(min=1, help="Tokens of each.")] = 2048,
    num_new_tokens: Annotated[int, typer.Option(min=2, help="Of the text after it.")] = 48,
    repeats: Annotated[int, typer.Option(min=1, help="Compactions that are timed.")] = 7,
    seed: Annotated[int, typer.Option(help="Of the questions.")] = 0,
) -> None:
    """Measure, print, and write."""
    settings = Settings(model, dtype, num_prompts, prompt_len, num_new_tokens, repeats, seed)
    found = [measure(settings, recipe) for recipe in RECIPES]
    rows, costs = [row for of_recipe, _ in found for row in of_recipe], [cost for _, cost in found]
    table = Table("recipe", "kind", "ratio", "errors: least, median, most", "loss, mean")
    for recipe, kind, ratio in dict.fromkeys((r["recipe"], r["kind"], r["ratio"]) for r in rows):
        of_kind = [r for r in rows if (r["recipe"], r["kind"], r["ratio"]) == (recipe, kind, ratio)]
        errors = [row["mean_error"] for row in of_kind]
        spread = f"{min(errors):.3f} {statistics.median(errors):.3f} {max(errors):.3f}"
        loss = statistics.mean(row["loss"] for row in of_kind)
        table.add_row(recipe, kind, str(ratio), spread, f"{loss:+.3f}")
    Console().print(table, costs)
    if out is not None:
        result = {
            "command": shlex.join(["python", "benchmarks/bench_guard.py", *sys.argv[1:]]),
            "environment": {**environment.describe(), "vllm": version("vllm")},
            "threads": os.environ.get("OMP_NUM_THREADS"),
            "settings": asdict(settings),
            "costs": costs,
            "requests": rows,
        }
        write(out, result)


if __name__ == "__main__":
    typer.run(main)
