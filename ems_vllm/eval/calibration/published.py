# SPDX-License-Identifier: Apache-2.0
"""Scores of heads and layers that others published, in the formats of their repositories."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ems_vllm.config.errors import ConfigError, shown
from ems_vllm.eval.calibration.fractions import in_proportion, layer_fractions
from ems_vllm.eval.calibration.measure import Calibration

_FORMATS = (
    '{"layer-head": [scores]} (HeadKV), {"layer": [query heads, the best first]} (CompressKV), '
    '{"layer": [retrieval kv_heads]} (RazorAttention), or {"avg_score": [of each layer]} '
    "(CompressKV's layers)"
)


def shape_of(model: str) -> tuple[int, int, int]:
    """Layers, query heads and kv_heads, by the model's config.json.

    Raises:
        ConfigError: there is none, or it does not say.
    """
    try:
        config = json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))
        num_heads = int(config["num_attention_heads"])
        num_kv_heads = int(config.get("num_key_value_heads") or num_heads)
        return int(config["num_hidden_layers"]), num_heads, num_kv_heads
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"model={shown(model)} has no config.json that names its layers and heads "
            f"({type(error).__name__}): give the model's folder."
        ) from None


def published(path: Path, shape: tuple[int, int, int], ratios: Sequence[float]) -> Calibration:
    """A calibration by somebody else.

    Args:
        path: A JSON file.
        shape: Of the model that it is about, see shape_of.
        ratios: Fractions that layers keep on the mean.

    Raises:
        ConfigError: the file is none of the known formats, or of another model.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"published={shown(str(path))} cannot be read ({type(error).__name__}): give a JSON "
            "file."
        ) from None
    try:
        return _read(data, shape, ratios)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ConfigError(
            f"published={shown(str(path))} is not about a model of {shape[0]} layers, {shape[1]} "
            f"query heads and {shape[2]} kv_heads ({error}): give a file of this model, as "
            f"{_FORMATS}."
        ) from None


def _read(data: Any, shape: tuple[int, int, int], ratios: Sequence[float]) -> Calibration:
    num_layers, num_heads, num_kv_heads = shape
    if "avg_score" in data:
        return _of_layers(data["avg_score"], num_layers, ratios)
    if any("-" in key for key in data):
        return _of_scores(data, shape, ratios)
    layers = {int(layer): [int(head) for head in heads] for layer, heads in data.items()}
    if all(sorted(heads) == list(range(num_heads)) for heads in layers.values()):
        return _of_orders([layers[layer] for layer in range(num_layers)], num_heads, ratios)
    whole = torch.zeros(num_layers, num_kv_heads)
    for layer, heads in layers.items():
        for head in heads:
            if not (0 <= layer < num_layers and 0 <= head < num_kv_heads):
                raise ValueError(f"it names kv_head {head} of layer {layer}")
            whole[layer, head] = 1.0
    return _of_importance(whole, whole, "retrieval heads", ratios)


def _of_scores(
    data: Mapping[str, Any], shape: tuple[int, int, int], ratios: Sequence[float]
) -> Calibration:
    """Trials of each query head."""
    num_layers, num_heads, num_kv_heads = shape
    scores = torch.zeros(num_layers, num_heads)
    if len(data) != scores.numel():
        raise ValueError(f"it has {len(data)} heads")
    for key, trials in data.items():
        layer, head = map(int, key.split("-"))
        scores[layer, head] = sum(trials) / max(1, len(trials))
    of_heads = scores.unflatten(1, (num_kv_heads, -1)).mean(-1)
    found = _of_importance(of_heads, scores, "published score", ratios)
    orders: list[list[int]] = scores.argsort(dim=-1, descending=True).tolist()
    return Calibration(found.fractions, found.head_fractions, orders, scores, found.what)


def _of_orders(orders: list[list[int]], num_heads: int, ratios: Sequence[float]) -> Calibration:
    """Which heads are best says nothing of budgets: layers are alike."""
    alike = [list(ratios) for _ in orders]
    shown_as = torch.zeros(len(orders), num_heads)
    for row, order in zip(shown_as, orders, strict=True):
        row[order] = torch.linspace(1, 0, num_heads)
    return Calibration(alike, None, orders, shown_as, "rank in the layer, the best 1")


def _of_layers(scores: Sequence[float], num_layers: int, ratios: Sequence[float]) -> Calibration:
    importance = torch.tensor([float(score) for score in scores])
    if len(importance) != num_layers:
        raise ValueError(f"it has {len(importance)} layers")
    fractions = layer_fractions(in_proportion(importance[:, None], ratios))
    return Calibration(fractions, None, None, importance[:, None], "published score")


def _of_importance(
    importance: torch.Tensor, shown_as: torch.Tensor, what: str, ratios: Sequence[float]
) -> Calibration:
    of_heads = in_proportion(importance, ratios)
    return Calibration(layer_fractions(of_heads), of_heads, None, shown_as, what)
