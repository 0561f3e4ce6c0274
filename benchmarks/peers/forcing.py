# SPDX-License-Identifier: Apache-2.0
"""Probabilities of known tokens after compressed prompts, several tokens at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from peers.decode import Decoder

# Logits that are held at a time.
_MAX_LOGITS = 1 << 27


@torch.inference_mode()
def forced_logprobs(
    decoder: Decoder, first_logits: torch.Tensor, token_ids: Sequence[int]
) -> list[tuple[float, ...]]:
    """Natural logarithm of the probability of each of the given tokens, for every answer.

    The decoder has read them afterwards, all but the last.

    Args:
        decoder: Of the answers.
        first_logits: [num_answers, vocabulary] - of the first of them.
        token_ids: The same for all answers.
    """
    num_answers, vocabulary = first_logits.shape
    size = max(1, _MAX_LOGITS // (num_answers * vocabulary))
    parts = [_logprobs(first_logits[:, None], token_ids[:1])]
    for start in range(0, len(token_ids) - 1, size):
        read = token_ids[start : min(start + size, len(token_ids) - 1)]
        logits = decoder.extend([list(read)] * num_answers)
        parts.append(_logprobs(logits, token_ids[start + 1 : start + 1 + len(read)]))
    return [tuple(row) for row in torch.cat(parts, dim=1).tolist()]


def _logprobs(logits: torch.Tensor, token_ids: Sequence[int]) -> torch.Tensor:
    """[num_answers, num_tokens] of logits [num_answers, num_tokens, vocabulary]."""
    index = torch.tensor(token_ids, device=logits.device)[:, None]
    # One answer at a time: in float32 the logits of all take several times as much memory.
    return torch.stack(
        [row.float().log_softmax(-1).gather(-1, index).squeeze(-1) for row in logits]
    )
