# SPDX-License-Identifier: Apache-2.0
"""A prompt's right answer under teacher forcing, and how well a cache predicts it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    from ems_vllm.eval.records.prompt_files import PromptLine

CONTINUATION = "continuation"


class Measurement(BaseModel):
    """How a cache predicts an answer.

    Attributes:
        loss: Nats per token.
        right: Whether every token is the greedy choice.
        kl: KL divergence from the full cache's distribution to this one's, nats per token.
        attention_error: See errors.AttentionErrors; None where it was not measured.
        kv_bytes: That the prompt takes per kv_head, mean over layers, right after it is compressed.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    loss: float
    right: bool
    kl: float = 0.0
    attention_error: float | None = None
    kv_bytes: float = 0.0


@dataclass(frozen=True)
class Forced:
    """What is fed after a prompt, and what is to be predicted.

    The loss counts the tokens that a compressed cache predicts. Where nothing is written between
    prompt and answer, the answer's first token is not one of them: the prompt itself predicts it.

    Attributes:
        num_written: Tokens between prompt and answer: a question, or how the answer begins.
        token_ids: These, then the answer.
    """

    num_written: int
    token_ids: tuple[int, ...]

    @classmethod
    def of(cls, prompt: PromptLine) -> Forced | None:
        """None where no token of a known answer is predicted by a compressed cache."""
        answer = prompt.continuation_token_ids or prompt.gold_token_ids
        # A continuation follows the prompt, as in transformers_engine.answer.
        written = (*prompt.written_token_ids, *prompt.lead_token_ids)
        if prompt.continuation_token_ids:
            written = ()
        if not answer or len(written) + len(answer) < 2:
            return None
        return cls(len(written), (*written, *answer))

    @property
    def fed(self) -> tuple[int, ...]:
        """What is fed: all but the last, which nothing follows."""
        return self.token_ids[:-1]

    @property
    def counted(self) -> tuple[int, ...]:
        """Tokens of the answer that a compressed cache predicts."""
        return self.token_ids[max(1, self.num_written) :]

    def logprobs(self, logits: torch.Tensor) -> torch.Tensor:
        """[num_counted, vocabulary], float32 - from the logits after each of `fed`."""
        return logits[-len(self.counted) :].float().log_softmax(-1)

    def measure(
        self, first_logits: torch.Tensor, logprobs: torch.Tensor, full: torch.Tensor | None
    ) -> Measurement:
        """Compare a cache's predictions with the answer and with the full cache's.

        Args:
            first_logits: [vocabulary] - after the prompt.
            logprobs: What `logprobs` gave.
            full: The same of the full cache; None if this is the full cache.
        """
        counted = torch.tensor(self.counted, device=logprobs.device)
        right = bool((logprobs.argmax(-1) == counted).all())
        if self.num_written == 0:
            right = right and int(first_logits.argmax()) == self.token_ids[0]
        kl = 0.0 if full is None else float((full.exp() * (full - logprobs)).sum(-1).mean())
        loss = -float(logprobs.gather(-1, counted[:, None]).mean())
        return Measurement(loss=loss, right=right, kl=kl)


def group(prompt: PromptLine) -> str:
    """Prompts that are averaged: of one protocol; running text is something of its own."""
    return CONTINUATION if prompt.continuation_token_ids else prompt.protocol
