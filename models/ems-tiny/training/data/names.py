# SPDX-License-Identifier: Apache-2.0
"""Keys and values: words, compounds, numbers, identifiers."""

import random
import string

Rng = random.Random


def digits(rng: Rng, n: int) -> str:
    return rng.choice("123456789") + "".join(rng.choices(string.digits, k=n - 1))


def hexes(rng: Rng, n: int) -> str:
    return "".join(rng.choices("0123456789abcdef", k=n))


def letters(rng: Rng, n: int) -> str:
    return "".join(rng.choices(string.ascii_uppercase, k=n))


class Names:
    """Draws keys and values of one kind at a time.

    Args:
        words: Lower-case words to compose from.
    """

    def __init__(self, words: list[str]) -> None:
        self.words = words

    def maker(self, rng: Rng, kind: str, pool: list[str]):
        """A function without arguments that draws one string of `kind`."""
        n = rng.randint(3, 8)
        sep = rng.choice(["-", "-", " ", "_", ""])
        return {
            "word": lambda: rng.choice(pool),
            "pair": lambda: rng.choice(pool) + "-" + rng.choice(pool),
            "compound": lambda: rng.choice(pool) + sep + rng.choice(pool),
            "name": lambda: rng.choice(pool).title() + " " + rng.choice(pool).title(),
            "number": lambda: digits(rng, n),
            "digits5": lambda: digits(rng, 5),
            "digits7": lambda: digits(rng, 7),
            "hex": lambda: hexes(rng, n),
            "hexes": lambda: "-".join(hexes(rng, 4) for _ in range(rng.choice([2, 3]))),
            "uuid": lambda: "-".join(hexes(rng, m) for m in (8, 4, 4, 4, 12)),
            "code": lambda: letters(rng, 2) + rng.choice(["", "-"]) + digits(rng, n // 2 + 1),
            "letters": lambda: letters(rng, rng.randint(3, 5)),
            "date": lambda: f"{rng.randint(1, 28)} {rng.choice(MONTHS)} {rng.randint(1700, 1999)}",
            "price": lambda: f"{rng.randint(1, 999)}.{rng.randint(10, 99)}",
        }[kind]

    def pool(self, rng: Rng) -> list[str]:
        """The words of one sequence; small pools make keys that differ in one half only."""
        if rng.random() < 0.35:
            return rng.sample(self.words, rng.randint(12, 30))
        return self.words

    def keys(self, rng: Rng, kind: str):
        """An endless stream of different keys."""
        seen: set[str] = set()
        make, failures = self.maker(rng, kind, self.pool(rng)), 0
        while True:
            key = make()
            if key in seen:
                failures += 1
                if failures > 20:  # the small pool is used up
                    make, failures = self.maker(rng, kind, self.words), 0
                continue
            seen.add(key)
            yield key


MONTHS = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
]
KEY_KINDS = {
    "word": 5, "pair": 6, "compound": 3, "name": 2, "number": 2, "hex": 1, "hexes": 1,
    "uuid": 0.4, "code": 1, "letters": 1,
}  # fmt: skip
VALUE_KINDS = {
    "number": 5, "digits5": 4, "digits7": 5, "word": 3, "pair": 1.5, "name": 1, "hex": 0.7,
    "hexes": 1, "uuid": 0.4, "code": 1, "date": 0.5, "price": 0.5,
}  # fmt: skip


def draw(rng: Rng, weights: dict[str, float]) -> str:
    """A key of `weights`, in proportion."""
    return rng.choices(list(weights), list(weights.values()))[0]
