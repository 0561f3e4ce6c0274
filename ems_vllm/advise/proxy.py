# SPDX-License-Identifier: Apache-2.0
"""How far a budget's next-token distributions are from the dense cache's, on transformers.

The dense cache answers greedily first, and every budget is led along that answer, as the evaluation
does it (eval/records/following.py, eval/lab/forcing.py): no answer has to be known as right.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from ems_vllm.config import RequestOptions, load_config
from ems_vllm.eval.lab.forcing import Forced
from ems_vllm.eval.transformers_engine.answer import generated
from ems_vllm.eval.transformers_engine.engine import TransformersEngine

if TYPE_CHECKING:
    import torch

    from ems_vllm.config import KVCompressionConfig
    from ems_vllm.eval.transformers_engine.prefill import Prefilled


@dataclass(frozen=True)
class Distance:
    """Of a budget on one prompt.

    Attributes:
        kl: KL divergence from the dense cache's next-token distribution, nats, mean over the
            answer's tokens but the first, which the prompt itself predicts.
        same_top: Of these, the share whose most likely token is the same.
    """

    kl: float
    same_top: float


class Proxy:
    """Runs prompts, one at a time.

    Args:
        engine: The model.
        configs: Of servers, one for each budget.
        num_tokens: Of an answer that are compared, at most; >= 2.
        end_token_ids: Tokens that end an answer.
    """

    def __init__(
        self,
        engine: TransformersEngine,
        configs: Sequence[KVCompressionConfig],
        num_tokens: int,
        end_token_ids: Collection[int],
    ) -> None:
        dense = load_config("ems")
        assert dense is not None
        self._engine = engine
        self._configs = configs
        self._dense = dense
        self._num_tokens = num_tokens
        self._end_token_ids = end_token_ids

    def prefill(self, token_ids: Sequence[int]) -> Prefilled:
        """Process a prompt for all budgets."""
        options = RequestOptions()
        found = [
            self._engine.scored_queries(len(token_ids), config, options) for config in self._configs
        ]
        window = max(config.obs_window for config in (self._dense, *self._configs))
        return self._engine.prefill(
            token_ids, window, {queries for queries in found if queries is not None}
        )

    def answer(self, prompt: Prefilled, most: int | None = None) -> tuple[int, ...]:
        """What the dense cache says, greedily, up to its end.

        Args:
            prompt: As `prefill` gave it.
            most: Tokens, at most; None: as many as are compared.
        """
        request = self._engine.request(prompt, self._dense, RequestOptions(enabled=False))
        answer: list[int] = []
        for token_id in islice(generated(prompt.logits, request.step), most or self._num_tokens):
            answer.append(token_id)
            if token_id in self._end_token_ids:
                break
        return tuple(answer)

    def distances(self, prompt: Prefilled, answer: tuple[int, ...]) -> list[Distance]:
        """Of each budget, led along an answer."""
        if len(answer) < 2:
            # The prompt itself says all of it, before anything is compressed.
            return [Distance(0.0, 1.0) for _ in self._configs]
        forced = Forced(0, answer)
        # Step by step other sums are rounded: that would be taken for a difference.
        dense = self._engine.request(prompt, self._dense, RequestOptions(enabled=False))
        full = forced.logprobs(dense.extend(forced.fed))
        return [self._distance(prompt, forced, full, config) for config in self._configs]

    def _distance(
        self,
        prompt: Prefilled,
        forced: Forced,
        full: torch.Tensor,
        config: KVCompressionConfig,
    ) -> Distance:
        logits, request = self._engine.begin(prompt, config, RequestOptions())
        logprobs = forced.logprobs(request.extend(forced.fed))
        same = float((logprobs.argmax(-1) == full.argmax(-1)).float().mean())
        return Distance(max(0.0, forced.measure(logits, logprobs, full).kl), same)
