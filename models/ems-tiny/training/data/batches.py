# SPDX-License-Identifier: Apache-2.0
"""Batches: a family for every row, padding, and stretched positions."""

import random
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from training.corpus import Corpus
from training.data import other, recall
from training.data.names import Names, draw
from training.data.writer import IGNORED, Writer
from training.tokenizer import PAD

FAMILIES = {
    "recall": recall.recall,
    "several": recall.several_values,
    "copy": other.copy,
    "tracking": other.tracking,
    "frequent": other.frequent,
    "chat": other.chat,
    "text": other.text,
}


@dataclass
class Batch:
    """Rows of one length.

    Attributes:
        ids: int64 [B, T].
        marks: int8 [B, T], IGNORED, TEXT or ANSWER: how ids[b, t] counts as a target.
        positions: int64 [B, T].
    """

    ids: Tensor
    marks: Tensor
    positions: Tensor


def stretch(rng: random.Random, length: int, context: int) -> Tensor:
    """Positions with a few jumps, so that short rows train long distances (PoSE, 2309.10400).

    Returns:
        int64 [length], increasing, below `context`.
    """
    positions = torch.arange(length)
    for _ in range(rng.randint(1, 3)):
        slack = context - 1 - int(positions[-1])
        if slack > 0:
            jump = int(slack * rng.random() ** 1.5)
            positions[rng.randrange(1, length) :] += jump
    return positions


class Batches:
    """Draws batch number `step` from the seed and that number alone, so that a run can resume.

    Args:
        tokenizer: The model's.
        corpus: Training novels.
        names: Keys and values.
        seed: Of the whole run.
        context: Positions of the model.
        stretched: Share of rows with stretched positions.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        corpus: Corpus,
        names: Names,
        seed: int,
        context: int,
        stretched: float,
    ) -> None:
        self.tokenizer, self.corpus, self.names = tokenizer, corpus, names
        self.seed, self.context, self.stretched = seed, context, stretched

    def row(self, rng: random.Random, length: int, mix: dict[str, float]) -> Writer:
        """One row of at most `length` tokens."""
        writer = Writer(self.tokenizer, length)
        FAMILIES[draw(rng, mix)](rng, writer, self.corpus, self.names)
        return writer

    def batch(self, step: int, length: int, tokens: int, mix: dict[str, float]) -> Batch:
        """Rows of `length` tokens, about `tokens` together."""
        rng = random.Random(f"{self.seed} {step}")
        rows = max(2, tokens // length)
        ids = torch.full((rows, length), PAD)
        marks = torch.full((rows, length), IGNORED, dtype=torch.int8)
        positions = torch.arange(length).repeat(rows, 1)
        for i in range(rows):
            writer = self.row(rng, length, mix)
            n = min(length, len(writer.ids))
            ids[i, :n] = torch.tensor(writer.ids[:n])
            marks[i, :n] = torch.tensor(writer.marks[:n], dtype=torch.int8)
            if length < self.context and rng.random() < self.stretched:
                positions[i] = stretch(rng, length, self.context)
        return Batch(ids, marks, positions)
