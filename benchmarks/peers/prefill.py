# SPDX-License-Identifier: Apache-2.0
"""One prefill, compressed by any number of presses."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from kvpress import FinchPress, KVzipPress
from transformers import DynamicCache

from peers.branch import Branch, Entries
from peers.kvzip import kvzip_branches
from peers.layers import attentions, sliding_windows

if TYPE_CHECKING:
    from kvpress import BasePress
    from transformers import PreTrainedModel


class FanOut:
    """Hands what a press would get to several presses, and leaves the cache as it is.

    A press changes the cache only after a layer's attention has run, so the prefill is the same
    under all of them, and one is enough.

    Args:
        presses: By any name.

    Attributes:
        layers: By the same name, what they left of the compressed layers so far.
        seconds: By the same name, what they took.
    """

    def __init__(self, presses: Mapping[Any, BasePress]) -> None:
        self._presses = presses
        self.layers: dict[Any, list[Entries]] = {name: [] for name in presses}
        self.seconds = dict.fromkeys(presses, 0.0)

    @contextmanager
    def __call__(self, model: PreTrainedModel) -> Iterator[None]:
        for press in self._presses.values():
            press.post_init_from_model(model)
        hooks = [
            module.register_forward_hook(self._hook, with_kwargs=True)
            for module, window in zip(attentions(model), sliding_windows(model), strict=True)
            if window is None
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _hook(self, module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        layer = kwargs["past_key_values"].layers[module.layer_idx]
        for name, press in self._presses.items():
            with _timed(self.seconds, name, layer.keys.device):
                module.masked_key_indices = None
                pair = press.compress(
                    module, kwargs["hidden_states"], layer.keys, layer.values, output[1], kwargs
                )
                self.layers[name].append(Entries.of(*pair, module.masked_key_indices))
        module.masked_key_indices = None


@dataclass
class Prefilled:
    """A prompt that has been processed.

    Attributes:
        prompt_len: Its tokens.
        logits: [vocabulary] - after its last token, which saw the prompt uncompressed.
        branches: By press.
        seconds: What each press took beside the one prefill.
        prefill_seconds: What that took.
    """

    prompt_len: int
    logits: torch.Tensor
    branches: dict[Any, Branch]
    seconds: dict[Any, float]
    prefill_seconds: float


@torch.inference_mode()
def prefill(
    model: PreTrainedModel, token_ids: Sequence[int], presses: Mapping[Any, BasePress]
) -> Prefilled:
    """Process a whole prompt and compress it as a server would."""
    in_passing = {name: p for name, p in presses.items() if not isinstance(p, KVzipPress)}
    rereading = {name: p for name, p in presses.items() if isinstance(p, KVzipPress)}
    fan_out = FanOut(in_passing)
    cache = DynamicCache()
    spent: dict[str, float] = {"prefill": 0.0, "kvzip": 0.0}
    with _timed(spent, "prefill", model.device), fan_out(model):
        input_ids = torch.tensor([token_ids], device=model.device)
        logits = model(input_ids, past_key_values=cache, logits_to_keep=1).logits
    full = [
        _rest(layer.keys, layer.values, window)
        for layer, window in zip(cache.layers, sliding_windows(model), strict=True)
    ]
    branches = {
        name: _branch(press, fan_out.layers[name], full, len(token_ids))
        for name, press in in_passing.items()
    }
    if rereading:
        with _timed(spent, "kvzip", model.device):
            branches |= kvzip_branches(model, token_ids, full, rereading)
    seconds = fan_out.seconds | dict.fromkeys(rereading, spent["kvzip"] / max(1, len(rereading)))
    return Prefilled(
        len(token_ids),
        logits[0, -1],
        {name: branches[name] for name in presses},
        seconds,
        spent["prefill"] - sum(fan_out.seconds.values()),
    )


def _rest(keys: torch.Tensor, values: torch.Tensor, window: int | None) -> Entries:
    """A layer that is left alone; of a sliding window's, what is still looked at."""
    if window is None:
        return Entries(keys, values)
    return Entries(keys[:, :, -window:], values[:, :, -window:], is_compressed=False)


def _branch(
    press: BasePress, compressed: Sequence[Entries], full: Sequence[Entries], prompt_len: int
) -> Branch:
    """A press's layers among those that it does not compress."""
    given = iter(compressed)
    layers = [next(given) if layer.is_compressed else layer for layer in full]
    # FINCH moves what it keeps together, as if there had been nothing else.
    moves = isinstance(press, FinchPress) and press.rerotate_keys
    return Branch(layers, compressed[0].length if moves else prompt_len)


@contextmanager
def _timed(seconds: dict[Any, float], name: Any, device: torch.device) -> Iterator[None]:
    start = time.perf_counter()
    yield
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds[name] += time.perf_counter() - start
