# SPDX-License-Identifier: Apache-2.0
"""The command `ems-vllm profile`."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Annotated

import typer
import yaml
from rich.console import Console
from rich.progress import track

from ems_vllm.config.errors import ConfigError, shown
from ems_vllm.eval.questions.haystack import read_texts

# Tokens that every head attends to whatever they are.
_NUM_SINKS = 4
_INSTRUCTION = "\n\nRepeat the text above, word by word.\n\n"


def profile(
    model: Annotated[str, typer.Argument(help="Model folder.")],
    out: Annotated[Path, typer.Option(help="Write the profile here, YAML.")],
    text_path: Annotated[
        Path | None, typer.Option(help="A text, or a folder of .txt files; else what ships.")
    ] = None,
    length: Annotated[int, typer.Option(min=64, help="Tokens of a passage.")] = 2048,
    samples: Annotated[int, typer.Option(min=1, help="Passages.")] = 8,
    ratios: Annotated[
        str, typer.Option(help="Fractions of a prompt that layers keep on the mean.")
    ] = "0.02,0.05,0.1,0.2,0.35,0.5,0.75",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto (the model's), float32, bfloat16")] = "auto",
) -> None:
    """Measure what each layer and kv_head of a model needs, for the allocator `profile`."""
    asked = _ratios(ratios)
    texts = read_texts(text_path)
    # Imported here: mistakes above must not take the seconds that transformers takes.
    from ems_vllm.eval.profiling.fractions import head_fractions, layer_fractions
    from ems_vllm.eval.profiling.reconstruction import reconstruction_peaks
    from ems_vllm.eval.questions.tokenizer import HubTokenizer
    from ems_vllm.eval.transformers_engine.engine import TransformersEngine

    tokenizer = HubTokenizer(model, "completion")
    special = tokenizer.encode_special()
    words = [tokenizer.encode_plain(text) for text in texts]
    parts = passages(words, samples, length - len(special))
    engine = TransformersEngine.load(model, device, dtype)
    console = Console()
    instruction = tokenizer.encode_plain(_INSTRUCTION)
    peaks = (
        reconstruction_peaks(engine, [*special, *part], instruction).cpu()
        for part in track(parts, "passages", console=console)
    )
    of_heads = head_fractions(peaks, asked, _NUM_SINKS)
    layers = engine.compressed_layers
    measured = {
        "model": Path(model).name,
        "ratios": asked,
        "fractions": dict(zip(layers, layer_fractions(of_heads), strict=True)),
        "head_fractions": dict(zip(layers, of_heads, strict=True)),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(yaml.safe_dump(measured, sort_keys=False, default_flow_style=None), "utf-8")
    console.print(f"{len(layers)} layers, {len(parts)} passages of {length:,} tokens: {out}")


def passages(texts: list[list[int]], count: int, length: int) -> list[list[int]]:
    """Parts of texts, as far from each other as there is room.

    Args:
        texts: Token ids.
        count: Of parts, spread over all texts, one after the other.
        length: Of a part.

    Raises:
        ConfigError: the texts hold too few tokens for one.
    """
    tokens = [token for text in texts for token in text]
    room = len(tokens) - length
    if room < 0:
        raise ConfigError(
            f"length={length} is not allowed: the texts hold {len(tokens)} tokens; give more text "
            "with --text-path, or lower it."
        )
    starts = dict.fromkeys(room * at // max(1, count - 1) for at in range(count))
    return [tokens[start : start + length] for start in starts]


def _ratios(text: str) -> list[float]:
    try:
        ratios = [float(part) for part in text.split(",")]
    except ValueError:
        ratios = []
    if not ratios or not all(0 < r < 1 for r in ratios) or any(a >= b for a, b in pairwise(ratios)):
        raise ConfigError(
            f"ratios={shown(text)} is not allowed: give fractions between 0 and 1 in ascending "
            "order, with commas between them."
        )
    return ratios
