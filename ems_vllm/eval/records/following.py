# SPDX-License-Identifier: Apache-2.0
"""How closely a compressed cache follows what the full cache answered. Ours.

There is no right answer here: the full cache answers greedily first, and every method predicts that
answer token by token. Two figures come of it: how many of its first tokens the method would have
chosen too, and how far its next-token distributions are from the full cache's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from pydantic import BaseModel, ConfigDict

NUM_TOP = 20
"""Most likely tokens that distributions are compared by; what vLLM reports at most by default."""

Top = Mapping[int, float]
"""Natural logarithms of probabilities by token id, of the most likely tokens."""


class FullAnswer(BaseModel):
    """What the full cache answered.

    Attributes:
        token_ids: Greedy; at least one.
        tops: The distribution that each was chosen from.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    token_ids: tuple[int, ...]
    tops: tuple[dict[int, float], ...]


class Followed(BaseModel):
    """How a method follows the full cache's answer.

    Attributes:
        num_tokens: Of the answer.
        num_same: Its first tokens that are the method's greedy choice too.
        kl: Kullback-Leibler divergence of the method's next-token distribution from the full
            cache's, in nats, mean over the answer's tokens; see `divergence`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    num_tokens: int
    num_same: int
    kl: float

    @property
    def agreement(self) -> float:
        """Share of the answer before the first divergence."""
        return self.num_same / self.num_tokens


def follow(full: FullAnswer, tops: Sequence[Top]) -> Followed:
    """Compare a method's distributions, one for each token of the full cache's answer."""
    num_same = 0
    for token_id, top in zip(full.token_ids, tops, strict=True):
        if max(top, key=lambda token: top[token]) != token_id:
            break
        num_same += 1
    kls = [divergence(p, q) for p, q in zip(full.tops, tops, strict=True)]
    return Followed(num_tokens=len(tops), num_same=num_same, kl=sum(kls) / len(kls))


def divergence(p: Top, q: Top) -> float:
    """KL(p || q) over the tokens that both report, all others taken together: a lower bound.

    Args:
        p, q: Of the full cache and of the method.

    Returns:
        Nats, >= 0.
    """
    common = p.keys() & q.keys()
    pairs = [(math.exp(p[token]), math.exp(q[token])) for token in common]
    rest = [max(1 - sum(side), 0.0) for side in zip(*pairs, strict=True)] or [1.0, 1.0]
    pairs.append((rest[0], rest[1]))
    # Rounding may leave nothing for the rest of one side.
    tiny = 1e-9
    total = sum(a * math.log(a / max(b, tiny)) for a, b in pairs if a > tiny)
    return max(total, 0.0)
