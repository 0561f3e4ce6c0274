# SPDX-License-Identifier: Apache-2.0
"""What stands between records: novels, or a few sentences again and again."""

from collections.abc import Iterator

import numpy as np

from training.corpus import Corpus
from training.data.names import Rng
from training.data.writer import Writer

NOISE = [
    "The rain is cold.",
    "The water is deep.",
    "A road leads north.",
    "The house is old.",
    "It was late.",
    "We sat by the fire.",
    "The wind blew all night.",
    "Snow lay on the hills.",
    "Nobody came.",
    "The clock struck nine.",
    "Birds sang in the trees.",
    "The door was shut.",
    "On and on it went.",
    "The sea was calm.",
    "A dog barked.",
    "The stars were bright.",
    "Then it was quiet again.",
    "The lamp is lit.",
    "The bread is fresh.",
    "The river runs east.",
    "Leaves fell in the garden.",
    "He walked to the town.",
    "She closed the book.",
    "The train was late.",
    "The moon is pale.",
    "Grapes are sweet.",
    "The stone is heavy.",
    "They laughed.",
    "Up and down the stairs.",
    "The tea is hot.",
    "The field is wide.",
    "It will be spring soon.",
    "Roses are red.",
    "The ship sailed at dawn.",
    "There was no answer.",
    "The cat slept.",
    "The coat is blue.",
]


def novel(rng: Rng, writer: Writer, corpus: Corpus) -> Iterator[np.ndarray]:
    """Consecutive sentences of a novel."""
    first = rng.randrange(len(corpus.starts) - 400)
    i = first
    while True:
        if i >= len(corpus.starts) - 1:
            i = 0
        yield corpus.tokens[corpus.starts[i] : corpus.starts[i + 1]]
        i += 1


def noise(rng: Rng, writer: Writer, corpus: Corpus) -> Iterator[list[int]]:
    """A few short sentences in turn."""
    chosen = [writer.encode(" " + s) for s in rng.sample(NOISE, rng.randint(2, 7))]
    while True:
        yield from chosen


def draw_filler(rng: Rng) -> str:
    """none, noise or novel."""
    return rng.choices(["none", "noise", "novel"], [4, 2, 4])[0]


FILLERS = {"novel": novel, "noise": noise}
