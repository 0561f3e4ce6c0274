# SPDX-License-Identifier: Apache-2.0
"""The command `ems-vllm calibrate`."""

from __future__ import annotations

from enum import StrEnum
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml
from rich.console import Console
from rich.progress import track

from ems_vllm.config.errors import ConfigError, shown
from ems_vllm.eval.questions.haystack import read_texts

if TYPE_CHECKING:
    from ems_vllm.eval.calibration.measure import Calibration, Measure
    from ems_vllm.eval.questions.tokenizer import Tokenizer

_INSTRUCTION = "\n\nRepeat the text above, word by word.\n\n"


class By(StrEnum):
    """What is measured."""

    REPETITION = "repetition"
    ATTENTION = "attention"
    INDUCTION = "induction"
    RETRIEVAL = "retrieval"
    REASONING = "reasoning"
    SEMANTIC = "semantic"
    ERROR = "error"


def calibrate(
    model: Annotated[str, typer.Argument(help="Model folder.")],
    out: Annotated[Path, typer.Option(help="Write the profile here, YAML, and a picture (.svg).")],
    by: Annotated[
        By,
        typer.Option(
            help="repetition (KVzip), attention (PrefixKV), induction (RazorAttention), retrieval "
            "(HeadKV), reasoning (HeadKV-R2), semantic (CompressKV's heads), error (CompressKV's "
            "layers)"
        ),
    ] = By.REPETITION,
    text_path: Annotated[
        Path | None, typer.Option(help="A text, or a folder of .txt files; else what ships.")
    ] = None,
    length: Annotated[int, typer.Option(min=64, help="Tokens of a sample.")] = 2048,
    samples: Annotated[int, typer.Option(min=1, help="Texts, or facts hidden in them.")] = 8,
    published: Annotated[
        Path | None, typer.Option(help="Measure nothing: convert scores that a paper published.")
    ] = None,
    ratios: Annotated[
        str, typer.Option(help="Fractions of a prompt that layers keep on the mean.")
    ] = "0.02,0.05,0.1,0.2,0.35,0.5,0.75",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto (the model's), float32, bfloat16")] = "auto",
) -> None:
    """Measure what layers and heads of a model need, for what reads a profile.

    A run that was cut off goes on where it was.
    """
    asked = _ratios(ratios)
    console = Console()
    if published is not None:
        _convert(model, published, asked, out)
        console.print(f"{published}: {out}")
        return
    texts = read_texts(text_path)
    # Imported here: mistakes above must not take the seconds that transformers takes.
    from ems_vllm.eval.calibration.parts import Parts
    from ems_vllm.eval.questions.tokenizer import HubTokenizer
    from ems_vllm.eval.transformers_engine.engine import TransformersEngine

    tokenizer = HubTokenizer(model, "completion")
    measure = _measure(by, tokenizer, texts, samples, length)
    engine = TransformersEngine.load(model, device, dtype)
    described = engine.describe(model, compiled=False)
    parts = Parts(out, {"by": by.value, "samples": measure.samples, **described})
    found = [
        parts.measured(at, partial(measure.of_sample, engine, sample))
        for at, sample in enumerate(track(measure.samples, "samples", console=console))
    ]
    answered = [one for one in found if one is not None]
    if not answered:
        raise ConfigError(
            f"by={by.value} finds nothing: the model answers none of {len(found)} questions of "
            f"{length} tokens; lower --length, or calibrate by induction, which needs no answers."
        )
    calibration = measure.result(answered, asked)
    _write(out, Path(model).name, by.value, engine.compressed_layers, asked, calibration)
    parts.remove()
    used = f"{len(answered)} of {len(found)} samples" if None in found else f"{len(found)} samples"
    layers = engine.compressed_layers
    console.print(f"{len(layers)} layers, {used} of {length:,} tokens: {out}, and a picture")


def _measure(by: By, tokenizer: Tokenizer, texts: list[str], count: int, length: int) -> Measure:
    from ems_vllm.eval.calibration import samples
    from ems_vllm.eval.calibration.induction import Induction
    from ems_vllm.eval.calibration.layer_errors import LayerErrors
    from ems_vllm.eval.calibration.retrieval import Reasoning, Retrieval, Semantic
    from ems_vllm.eval.calibration.texts import Mass, Repetition

    special = tokenizer.encode_special()
    words = [tokenizer.encode_plain(text) for text in texts]
    if by is By.INDUCTION:
        known = [token for text in words for token in text]
        return Induction(samples.periods(known, special, count, length), len(special))
    if by in (By.RETRIEVAL, By.REASONING, By.SEMANTIC):
        is_reasoned = by is By.REASONING
        facts = samples.facts(words, tokenizer, count, length, is_reasoned)
        if by is By.SEMANTIC:
            return Semantic(facts)
        return Reasoning(facts) if is_reasoned else Retrieval(facts)
    parts = [[*special, *part] for part in samples.passages(words, count, length - len(special))]
    if by is By.ATTENTION:
        return Mass(parts)
    if by is By.ERROR:
        return LayerErrors(parts)
    return Repetition(parts, tokenizer.encode_plain(_INSTRUCTION))


def _convert(model: str, path: Path, ratios: list[float], out: Path) -> None:
    from ems_vllm.eval.calibration.published import published, shape_of

    shape = shape_of(model)
    found = published(path, shape, ratios)
    _write(out, Path(model).name, f"published {path.name}", list(range(shape[0])), ratios, found)


def _write(
    out: Path, model: str, by: str, layers: list[int], ratios: list[float], found: Calibration
) -> None:
    """What LayerProfile reads, and a picture."""
    from ems_vllm.eval.calibration.plot import draw_heads

    written: dict[str, Any] = {
        "model": model,
        "by": by,
        "ratios": ratios,
        "fractions": dict(zip(layers, found.fractions, strict=True)),
    }
    if found.head_fractions is not None:
        written["head_fractions"] = dict(zip(layers, found.head_fractions, strict=True))
    if found.query_heads is not None:
        written["query_heads"] = dict(zip(layers, found.query_heads, strict=True))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(yaml.safe_dump(written, sort_keys=False, default_flow_style=None), "utf-8")
    draw_heads(found.shown, found.what, model, out.with_suffix(".svg"))


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
