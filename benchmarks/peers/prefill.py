# SPDX-License-Identifier: Apache-2.0
"""One prefill, compressed by any number of presses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from kvpress import BasePress
from transformers import DynamicCache

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class Branch:
    """What one press has made of a prompt.

    Attributes:
        layers: (keys, values) of every layer, [1, num_kv_heads, num_entries, head_size].
        masked: Of every layer, the entries that the attention of kvpress hides, or None; presses
            that keep a different number per kv_head hide entries instead of dropping them.
    """

    layers: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    masked: list[tuple[torch.Tensor, ...] | None] = field(default_factory=list)

    @property
    def shape(self) -> tuple[int, ...] | None:
        """Entries of every layer; None where some are hidden. Equal shapes decode together."""
        if any(masked is not None for masked in self.masked):
            return None
        return tuple(keys.shape[2] for keys, _ in self.layers)

    def entries_per_head(self) -> float:
        """Entries that attention sees, averaged over layers and kv_heads."""
        num_kv_heads = self.layers[0][0].shape[1]
        kept = sum(keys.shape[1] * keys.shape[2] for keys, _ in self.layers)
        hidden = sum(masked[0].numel() for masked in self.masked if masked is not None)
        return (kept - hidden) / (num_kv_heads * len(self.layers))


class FanOutPress(BasePress):
    """Hands what a press would get to several presses, and leaves the cache as it is.

    A press changes the cache only after a layer's attention has run, so the prefill is the same
    under all of them, and one is enough.

    Args:
        presses: By any name.

    Attributes:
        branches: By the same name, after a forward pass under this press.
    """

    def __init__(self, presses: Mapping[Any, BasePress]) -> None:
        self._presses = presses
        self.branches = {name: Branch() for name in presses}

    def post_init_from_model(self, model: PreTrainedModel) -> None:
        for press in self._presses.values():
            press.post_init_from_model(model)

    def compress(
        self,
        module: torch.nn.Module,
        hidden_states: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        attentions: torch.Tensor,
        kwargs: dict[str, Any],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        for name, press in self._presses.items():
            module.masked_key_indices = None
            pair = press.compress(module, hidden_states, keys, values, attentions, kwargs)
            branch = self.branches[name]
            branch.layers.append(pair)
            branch.masked.append(module.masked_key_indices)
        module.masked_key_indices = None
        return keys, values


@dataclass
class Prefilled:
    """A prompt that has been processed.

    Attributes:
        prompt_len: Its tokens.
        logits: [vocabulary] - after its last token, which saw the prompt uncompressed.
        branches: By press.
    """

    prompt_len: int
    logits: torch.Tensor
    branches: dict[Any, Branch]


@torch.inference_mode()
def prefill(
    model: PreTrainedModel, token_ids: Sequence[int], presses: Mapping[Any, BasePress]
) -> Prefilled:
    """Process a whole prompt, its question included, and compress it as a server would."""
    fan_out = FanOutPress(presses)
    input_ids = torch.tensor([token_ids], device=model.device)
    with fan_out(model):
        logits = model(input_ids, past_key_values=DynamicCache(), logits_to_keep=1).logits
    return Prefilled(len(token_ids), logits[0, -1], fan_out.branches)
