# SPDX-License-Identifier: Apache-2.0
"""What an engine loses by rounding: bfloat16 in vLLM and transformers, against float32.

Usage: ems-vllm eval MODEL --preset tiny --lengths 1024 --export-prompts prompts.jsonl
       python benchmarks/bench_rounding.py --model MODEL --prompts prompts.jsonl

Every prompt, with its right answer behind it, is predicted token by token: most of it as a prompt,
the last tokens one by one, as when they are generated. The truth is transformers in float32. Two
engines that round equally well differ from it by equally much, though not in the same places, and
so their texts part. Caches are full: compression is not measured here.
"""

import gc
import math
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import offline
import torch
import typer
from rich.console import Console
from rich.table import Table
from serving.report import write

from ems_vllm.eval.records import environment
from ems_vllm.eval.records.prompt_files import PromptLine, read_prompts
from ems_vllm.eval.script import run_script

VLLM = "vLLM"
# Attention of transformers by name.
PEERS = {"transformers, sdpa": "sdpa", "transformers, eager": "eager"}
# Rows of logits that are in float32 at a time.
_ROWS = 256


@dataclass(frozen=True)
class Predicted:
    """What a model says of every token of a text but the first.

    Attributes:
        logprobs: [num_tokens - 1], float32 - natural logarithm of the token's probability.
        greedy: [num_tokens - 1], int64 - the most likely token in its place.
    """

    logprobs: torch.Tensor
    greedy: torch.Tensor

    @classmethod
    def of(cls, logits: Sequence[torch.Tensor], token_ids: Sequence[int]) -> "Predicted":
        """From logits [num_rows, vocabulary] after every token but the last, in pieces."""
        parts = [part for piece in logits for part in piece.split(_ROWS)]
        targets = torch.tensor(token_ids[1:]).split([len(part) for part in parts])
        found = [
            part.float().log_softmax(-1).gather(1, target[:, None])[:, 0]
            for part, target in zip(parts, targets, strict=True)
        ]
        return cls(torch.cat(found), torch.cat([part.argmax(-1) for part in parts]))


@dataclass(frozen=True)
class Text:
    """Tokens, the last `num_decoded` of which are predicted one by one."""

    token_ids: list[int]
    num_decoded: int

    @classmethod
    def of(cls, prompt: PromptLine, num_decoded: int) -> "Text":
        answer = prompt.continuation_token_ids or prompt.gold_token_ids
        token_ids = [*prompt.prompt_token_ids, *prompt.written_token_ids, *answer]
        return cls(token_ids, min(num_decoded, len(token_ids) - 1))

    @property
    def prompt(self) -> list[int]:
        return self.token_ids[: len(self.token_ids) - self.num_decoded]

    @property
    def decoded(self) -> list[int]:
        return self.token_ids[len(self.prompt) :]


@dataclass(frozen=True)
class Row:
    """An engine's distance from the truth.

    Attributes:
        part: "prompt" or "decoding".
        error: Mean absolute error of a token's log probability, nats.
        rms_error: The root of its mean square.
        other_greedy: Share of places where another token is the most likely one.
        every_error: `error` of every text.
    """

    engine: str
    part: str
    num_tokens: int
    error: float
    rms_error: float
    other_greedy: float
    every_error: list[float]


@torch.inference_mode()
def ask_transformers(
    model: str, dtype: str, attention: str, texts: Sequence[Text]
) -> Iterator[Predicted]:
    """Predictions of transformers; the truth is asked for everything at once."""
    from transformers import AutoModelForCausalLM, DynamicCache

    loaded: Any = AutoModelForCausalLM.from_pretrained(
        model, dtype=getattr(torch, dtype), attn_implementation=attention
    ).eval()
    for text in texts:
        cache = DynamicCache(config=loaded.config)
        steps = [text.prompt, *([token] for token in text.decoded[:-1])]
        logits = [loaded(torch.tensor([step]), past_key_values=cache).logits[0] for step in steps]
        if text.num_decoded == 0:
            logits[-1] = logits[-1][:-1]
        yield Predicted.of(logits, text.token_ids)


def ask_vllm(model: str, dtype: str, chunk: int, texts: Sequence[Text]) -> Iterator[Predicted]:
    """Predictions of vLLM, by the log probabilities that it reports.

    Args:
        chunk: Tokens of a prompt that it processes in a step at most.
    """
    longest = max(len(text.token_ids) for text in texts) + 1
    arguments = {"max_num_batched_tokens": chunk, "enable_prefix_caching": False}
    with offline.engine(model, dtype=dtype, longest=longest, **arguments) as llm:
        from vllm import SamplingParams

        for text in texts:
            params = SamplingParams(
                max_tokens=max(1, text.num_decoded),
                temperature=0,
                ignore_eos=True,
                logprobs=1,
                prompt_logprobs=1,
                extra_args={"forced_token_ids": text.decoded},
            )
            inputs = {"prompt_token_ids": text.prompt}
            (output,) = llm.generate([inputs], params, use_tqdm=False)
            generated = output.outputs[0].logprobs[: text.num_decoded]
            places = [*output.prompt_logprobs[1:], *generated]
            yield Predicted(
                torch.tensor(
                    [
                        place[token].logprob
                        for place, token in zip(places, text.token_ids[1:], strict=True)
                    ]
                ),
                torch.tensor([min(place, key=lambda t: place[t].rank) for place in places]),
            )


def compare(
    engine: str, texts: Sequence[Text], truth: Sequence[Predicted], found: Sequence[Predicted]
) -> Iterator[Row]:
    """An engine's two rows; of one that has no token to predict, none."""
    parts = {
        "prompt": [slice(0, len(text.prompt) - 1) for text in texts],
        "decoding": [slice(len(text.prompt) - 1, None) for text in texts],
    }
    for part, places in parts.items():
        errors = [
            (f.logprobs[place] - t.logprobs[place]).abs()
            for t, f, place in zip(truth, found, places, strict=True)
        ]
        others = [
            f.greedy[place] != t.greedy[place]
            for t, f, place in zip(truth, found, places, strict=True)
        ]
        all_errors = torch.cat(errors).double()
        if len(all_errors) > 0:
            yield Row(
                engine=engine,
                part=part,
                num_tokens=len(all_errors),
                error=float(all_errors.mean()),
                rms_error=math.sqrt(float(all_errors.square().mean())),
                other_greedy=float(torch.cat(others).double().mean()),
                every_error=[round(float(error.mean()), 5) for error in errors if len(error) > 0],
            )


def measure(
    model: str, dtype: str, chunk: int, texts: Sequence[Text], peers: Sequence[str] = (*PEERS,)
) -> list[Row]:
    """All rows.

    Args:
        peers: Which of PEERS are measured beside vLLM.
    """
    whole = [Text(text.token_ids, 0) for text in texts]
    truth = list(ask_transformers(model, "float32", "sdpa", whole))
    rows: list[Row] = []
    for name in peers:
        gc.collect()
        found = list(ask_transformers(model, dtype, PEERS[name], texts))
        rows += compare(name, texts, truth, found)
    gc.collect()
    rows += compare(VLLM, texts, truth, list(ask_vllm(model, dtype, chunk, texts)))
    return rows


def main(
    model: Annotated[str, typer.Option(help="Model folder.")],
    prompts: Annotated[Path, typer.Option(help="What `eval --export-prompts` wrote.")],
    dtype: Annotated[str, typer.Option(help="What is measured.")] = "bfloat16",
    decoded: Annotated[int, typer.Option(min=0, help="Last tokens, predicted one by one.")] = 32,
    chunk: Annotated[int, typer.Option(min=16, help="Tokens of a step of vLLM.")] = 512,
    limit: Annotated[int | None, typer.Option(min=1, help="First prompts only.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the report here, JSON.")] = None,
) -> None:
    """What an engine loses by rounding."""
    described = {**environment.describe(), "transformers": version("transformers")}
    texts = [Text.of(line, decoded) for line in read_prompts(prompts)[:limit]]
    rows = measure(model, dtype, chunk, texts)
    table = Table(title=f"{Path(model).name}, {dtype}, {len(texts)} prompts, against float32")
    for label in ("", "", "tokens", "error, nats", "root mean square", "other greedy token"):
        table.add_column(label, justify="right")
    for row in sorted(rows, key=lambda row: row.part, reverse=True):
        figures = (f"{row.error:.4f}", f"{row.rms_error:.4f}", f"{row.other_greedy:.2%}")
        table.add_row(row.part, row.engine, str(row.num_tokens), *figures)
    Console().print(table)
    if out is not None:
        report = {
            "command": shlex.join(["python", *sys.argv]).replace(model, Path(model).name),
            "environment": described,
            "model": Path(model).name,
            "dtype": dtype,
            "chunk": chunk,
            "text_tokens": [len(text.token_ids) for text in texts],
            "engines": [asdict(row) for row in rows],
        }
        write(out, report)


if __name__ == "__main__":
    run_script(main)
