# SPDX-License-Identifier: Apache-2.0
"""What a compressed cache changes in the output of attention, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from ems_vllm.eval.transformers_engine.attention import visible_behind
from ems_vllm.eval.transformers_engine.projection import output_projections

if TYPE_CHECKING:
    from ems_vllm.eval.transformers_engine.engine import TransformersEngine
    from ems_vllm.eval.transformers_engine.request import CompressedRequest


class QueryRecorder:
    """Collects the queries of the compressed layers; an observer (attention.Observer)."""

    def __init__(self, layers: list[int]) -> None:
        self._queries: dict[int, list[torch.Tensor]] = {layer: [] for layer in layers}

    def __call__(self, layer: int, queries: torch.Tensor, keys: torch.Tensor) -> None:
        if layer in self._queries:
            self._queries[layer].append(queries.clone())

    def queries(self) -> list[torch.Tensor]:
        """[num_tokens, num_heads, head_size] of each layer."""
        return [torch.cat(chunks) for chunks in self._queries.values()]


class AttentionErrors:
    """Relative errors of attention's output, after its projection, against the full cache (ours).

    The full cache's own queries attend to a compressed prompt, followed by the full cache's keys
    and values of the tokens after it. So every layer is asked what its own compression changes;
    nothing is carried over from the layers before it.

    Args:
        engine: The model.
        queries: Of the tokens after the prompt, by layer.
        full: The uncompressed request that has processed them.

    Raises:
        ConfigError: attention has no projection `o_proj`.

    Attributes:
        outputs: The full cache's by layer, [num_tokens, hidden_size], float32.
    """

    def __init__(
        self, engine: TransformersEngine, queries: list[torch.Tensor], full: CompressedRequest
    ) -> None:
        self._scale = engine.scale
        self._projections = projections(engine)
        self._queries = queries
        num_tokens = len(queries[0])
        keys, values = full.entries()
        # Copies, so that the prompt's entries can go.
        self._new_keys = [of_layer[:, -num_tokens:].clone() for of_layer in keys]
        self._new_values = [of_layer[:, -num_tokens:].clone() for of_layer in values]
        self.outputs = [
            self._output(layer, keys[layer], values[layer], num_tokens)
            for layer in range(len(queries))
        ]

    @torch.inference_mode()
    def by_layer(
        self,
        keys: Sequence[torch.Tensor],
        values: Sequence[torch.Tensor],
        num_tokens: int,
        gaps: Sequence[torch.Tensor | None] = (),
    ) -> torch.Tensor:
        """Mean over tokens of |output - full output| / |full output|, [num_layers], float32.

        Args:
            keys, values: By layer, [num_kv_heads, num_entries, head_size] - of the prompt.
            num_tokens: First tokens after the prompt to compare; later ones see another cache.
            gaps: By layer, [num_kv_heads]: leading places of each head that hold no entry; None
                for none; empty where no layer has any.
        """
        errors = []
        for layer, full in enumerate(self.outputs):
            new_keys = self._new_keys[layer][:, :num_tokens]
            new_values = self._new_values[layer][:, :num_tokens]
            output = self._output(
                layer,
                torch.cat([keys[layer], new_keys], dim=1),
                torch.cat([values[layer], new_values], dim=1),
                num_tokens,
                gaps[layer] if gaps else None,
            )
            full = full[:num_tokens]
            norms = full.norm(dim=-1).clamp_min(torch.finfo(full.dtype).tiny)
            errors.append(((output - full).norm(dim=-1) / norms).mean())
        return torch.stack(errors)

    @torch.inference_mode()
    def _output(
        self,
        layer: int,
        keys: torch.Tensor,
        values: torch.Tensor,
        num_tokens: int,
        gaps: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[num_tokens, hidden_size], float32 - of queries at the end of some entries."""
        queries = self._queries[layer][:num_tokens].float().transpose(0, 1)
        if gaps is None:
            gaps = torch.zeros(1, dtype=torch.int64)
        visible = visible_behind(gaps.to(keys.device), num_tokens, keys.shape[1])
        # A mask of one head is that of all.
        visible = visible.repeat_interleave(queries.shape[0] // len(visible), dim=0)
        attended = functional.scaled_dot_product_attention(
            queries[None],
            keys[None].float(),
            values[None].float(),
            attn_mask=visible[None],
            scale=self._scale,
            enable_gqa=True,
        )
        projection = self._projections[layer]
        bias = None if projection.bias is None else projection.bias.float()
        flat = attended[0].transpose(0, 1).flatten(1)
        return functional.linear(flat, projection.weight.float(), bias)


def projections(engine: TransformersEngine) -> list[torch.nn.Linear]:
    """Output projections of the compressed layers.

    Raises:
        ConfigError: there are none by the usual name.
    """
    return output_projections(
        engine.model, engine.compressed_layers, "give --no-errors, which leaves their errors open"
    )
