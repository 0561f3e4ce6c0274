# SPDX-License-Identifier: Apache-2.0
"""kvpress and transformers as their documentation uses them, to compare with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from kvpress import CAMPress, FinchPress
from kvpress.presses.base_press import BasePress
from transformers import DynamicCache

from peers.attention import IMPLEMENTATION
from peers.branch import Entries
from peers.kvzip import prefix_length
from peers.layers import attentions

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Official:
    """A prompt under one press.

    Args:
        model: Without sliding windows.
        press: One of presses.build.
        token_ids: The prompt.

    Attributes:
        layers: What the press left of it.
    """

    @torch.inference_mode()
    def __init__(self, model: PreTrainedModel, press: BasePress, token_ids: Sequence[int]) -> None:
        self._model = model
        self._cache = DynamicCache()
        modules = attentions(model)
        for module in modules:
            module.masked_key_indices = None
        with _sdpa(model), _compressing(model, press):
            input_ids = torch.tensor([token_ids], device=model.device)
            model(input_ids, past_key_values=self._cache)
            if hasattr(press, "prefix_length"):
                press.prefix_length = prefix_length(model, token_ids, press.prefix_length)
        self.layers = [
            Entries.of(layer.keys, layer.values, module.masked_key_indices)
            for layer, module in zip(self._cache.layers, modules, strict=True)
        ]

    @torch.inference_mode()
    def step(self, token_id: int, position: int) -> torch.Tensor | None:
        """Logits after one more token, [vocabulary]; None where kvpress cannot hide entries."""
        try:
            with _sdpa(self._model):
                logits: torch.Tensor = self._model(
                    torch.tensor([[token_id]], device=self._model.device),
                    past_key_values=self._cache,
                    position_ids=torch.tensor([[position]], device=self._model.device),
                ).logits[0, -1]
        except ValueError:
            return None
        finally:
            for module in attentions(self._model):
                module.masked_key_indices = None
        return logits


@torch.inference_mode()
def decoded_cam(model: PreTrainedModel, press: Any, token_ids: Sequence[int]) -> list[Entries]:
    """What CAMPress leaves of a prompt whose last tokens are decoded.

    Args:
        model: Without sliding windows.
        press: A seeded cam.PromptCam, which knows N, how many tokens, the scorer and the seed.
        token_ids: The prompt.
    """
    inner, count = press.press, press.press.num_decoded

    class SeededCam(CAMPress):  # type: ignore[misc]
        def compress(self, module: Any, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
            with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
                torch.manual_seed(press.layer_seed(module))
                result: tuple[torch.Tensor, torch.Tensor] = super().compress(module, *args)
            return result

    cam = SeededCam(inner.base_press, target_size=inner.entries, compression_interval=count)
    cache = DynamicCache()
    with _sdpa(model), cam(model):
        for chunk in (token_ids[:-count], *([token_id] for token_id in token_ids[-count:])):
            model(torch.tensor([chunk], device=model.device), past_key_values=cache)
    return [Entries(layer.keys, layer.values) for layer in cache.layers]


def same_entries(
    some: Sequence[Entries], others: Sequence[Entries], tolerance: float = 0.0
) -> bool:
    """Whether layers hold the same, up to a tolerance relative to the largest."""
    for one, other in zip(some, others, strict=True):
        if one.keys.shape != other.keys.shape or (one.visible is None) != (other.visible is None):
            return False
        if one.visible is not None and not torch.equal(one.visible, other.visible):
            return False
        for mine, theirs in ((one.keys, other.keys), (one.values, other.values)):
            if (mine - theirs).abs().max() > tolerance * theirs.abs().max():
                return False
    return True


def _compressing(model: PreTrainedModel, press: BasePress) -> AbstractContextManager[None]:
    # FINCH's own wants a token that marks the window, and takes it out again.
    alone = BasePress.__call__(press, model) if isinstance(press, FinchPress) else press(model)
    result: AbstractContextManager[None] = alone
    return result


@contextmanager
def _sdpa(model: PreTrainedModel) -> Iterator[None]:
    """The attention that kvpress has patched."""
    model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        model.set_attn_implementation(IMPLEMENTATION)
