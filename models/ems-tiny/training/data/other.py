# SPDX-License-Identifier: Apache-2.0
"""Copying, variable tracking, frequent words, chats, and plain text."""

from collections import Counter

from training.corpus import Corpus
from training.data.filler import FILLERS
from training.data.names import VALUE_KINDS, Names, Rng, digits, draw, letters
from training.data.writer import ANSWER, TEXT, Writer
from training.tokenizer import EOS


def _fill(rng: Rng, writer: Writer, corpus: Corpus, reserve: int, most: int) -> None:
    """Running text of at most `most` tokens, leaving `reserve`."""
    stop = len(writer.ids) + most
    for piece in FILLERS[rng.choice(["novel", "noise"])](rng, writer, corpus):
        if len(piece) + reserve > writer.room or len(writer.ids) + len(piece) > stop:
            return
        writer.add(piece)


def copy(rng: Rng, writer: Writer, corpus: Corpus, names: Names) -> None:
    """Segments of text or of random tokens, each repeated later on."""
    kind = rng.choice(["novel", "random", "words"])
    segments: list[list[int]] = []
    while writer.room > 24:
        if segments and rng.random() < 0.55:
            segment = rng.choice(segments)
            segment = segment[rng.randrange(max(1, len(segment) // 2)) :][: writer.room]
            # Which segment it is shows after two tokens only.
            writer.add(segment[:2])
            writer.add(segment[2:], ANSWER)
            continue
        size = min(rng.randint(8, 60), writer.room)
        if kind == "novel":
            at = rng.randrange(len(corpus.tokens) - size)
            segment = corpus.tokens[at : at + size].tolist()
        elif kind == "random":
            segment = [rng.randrange(4, 2048) for _ in range(size)]
        else:
            segment = writer.encode(" " + " ".join(rng.choices(names.words, k=size // 2)))[:size]
        segments.append(segment)
        writer.add(segment)


def tracking(rng: Rng, writer: Writer, corpus: Corpus, names: Names) -> None:
    """Chains of assignments; the question is which variables hold a value, or what one holds."""
    word = rng.choice(["VAR", "VAR", "let", "variable", "set", "cell"])
    eq = rng.choice([" = ", " = ", " := ", " is ", " <- "])
    n = rng.randint(3, 5)
    chains: list[tuple[str, list[str]]] = []
    lines: list[list[str]] = []
    seen: set[str] = set()

    def fresh() -> str:
        while (name := letters(rng, n) if rng.random() < 0.8 else f"X{digits(rng, 2)}") in seen:
            pass
        seen.add(name)
        return name

    per_line = 24
    room = int(writer.room * rng.uniform(0.35, 0.7))
    total = max(1, min(room // per_line, rng.choice([5, 8, 10, 20, 40])))
    while sum(len(c[1]) for c in chains) < total:
        value, names_ = digits(rng, rng.choice([2, 3, 5, 5, 5])), []
        length = rng.choice([1, 2, 3, 4, 5, 5])
        chain: list[str] = []
        for i in range(length):
            name = fresh()
            source = value if i == 0 else f"{word} {names_[-1]}"
            chain.append(f"{word} {name}{eq}{source}")
            names_.append(name)
        chains.append((value, names_))
        lines.append(chain)
    # Chains are woven into each other, each in its own order.
    order = [i for i, chain in enumerate(lines) for _ in chain]
    rng.shuffle(order)
    at = [0] * len(lines)
    reserve = max(60, writer.room // 4)
    gap = 0 if rng.random() < 0.4 else max(0, writer.room - reserve - total * per_line) // total
    done: Counter[int] = Counter()
    for i in order:
        text = lines[i][at[i]]
        at[i] += 1
        if not writer.add_if_room([("\n" + text + "\n", TEXT)], reserve):
            break
        done[i] += 1
        if gap:
            _fill(rng, writer, corpus, reserve, gap)
    answers = [(chains[i][0], chains[i][1][: done[i]]) for i in range(len(lines)) if done[i]]
    rng.shuffle(answers)
    style = rng.random()
    form = rng.choice([
        ("Which variables hold {v}? They are", " "),
        ("List all variables with the value {v}. These variables have the value {v}:", " "),
        ("The names that stand for {v} are", " "),
    ])  # fmt: skip
    for value, held in answers * 3:
        if style < 0.6:
            pieces = [("\n" + form[0].replace("{v}", value), TEXT)]
            pieces += [(f" {name}" + ("," if i < len(held) - 1 else "."), ANSWER)
                       for i, name in enumerate(held)]  # fmt: skip
        else:
            name = rng.choice(held)
            pieces = [(f"\n{word} {name}{eq.rstrip()}", TEXT), (f" {value}", ANSWER)]
        if not writer.add_if_room(pieces, 1):
            break
    writer.add([EOS], ANSWER)


def frequent(rng: Rng, writer: Writer, corpus: Corpus, names: Names) -> None:
    """Which words come up most often in a list."""
    top = rng.choice([1, 2, 3, 3])
    few = rng.sample(names.words, rng.randint(top + 2, 12))
    weights = [1 / (i + 1) ** rng.uniform(1.0, 2.0) for i in range(len(few))]
    counts: Counter[str] = Counter()
    sep = rng.choice([" ", ", ", " . "])
    writer.add("Count the words in this list.\n")
    room = int(writer.room * rng.uniform(0.5, 0.95)) - 60
    used = 0
    while used < room:
        word = rng.choices(few, weights)[0] if rng.random() < 0.8 else rng.choice(names.words)
        ids = writer.encode(sep.rstrip() + " " + word)
        if len(ids) + 60 > writer.room:
            break
        writer.add(ids)
        used += len(ids)
        counts[word] += 1
    best = [w for w, _ in counts.most_common(top)]
    writer.add(f"\nThe {top} most frequent word{'s' if top > 1 else ''}:")
    writer.add_if_room([(" " + ", ".join(best) + ".", ANSWER)], 1)
    writer.add([EOS], ANSWER)


ATTRIBUTES = [
    "name",
    "city",
    "dog",
    "favourite colour",
    "phone number",
    "room number",
    "birthday",
    "password",
    "job",
    "lucky number",
    "ticket",
    "home town",
    "train",
    "account",
    "pin",
    "bus",
    "street",
    "boat",
    "horse",
    "locker code",
    "sister",
    "teacher",
]
OWNERS = ["my", "my", "our", "the", "Anna's", "Tom's", "my mother's", "the captain's"]


def chat(rng: Rng, writer: Writer, corpus: Corpus, names: Names) -> None:
    """Turns in the chat template: facts told early are asked for later."""
    facts: list[tuple[str, str]] = []
    told: set[str] = set()
    used = 0
    while writer.room > 90:
        move = rng.random()
        if not facts or move < 0.35:
            thing = f"{rng.choice(OWNERS)} {rng.choice(ATTRIBUTES)}"
            if rng.random() < 0.4:
                thing = f"the {rng.choice(ATTRIBUTES)} of {rng.choice(names.words).title()}"
            if thing in told:
                continue
            told.add(thing)
            value = names.maker(rng, draw(rng, VALUE_KINDS), names.words)()
            say = rng.choice([f"{thing[0].upper()}{thing[1:]} is {value}.",
                              f"Remember that {thing} is {value}.",
                              f"Please note: {thing} is {value}."])  # fmt: skip
            reply = rng.choice(["Noted.", "I will remember that.", "Thank you.",
                                f"I see, {thing} is {value}."])  # fmt: skip
            if not writer.add_if_room([(f"user: {say}\nassistant: {reply}\n", TEXT)], 60):
                break
            facts.append((thing, value))
        elif move < 0.75:
            thing, value = rng.choice(facts[: max(1, len(facts) - 1)])
            other = thing.replace("my ", "your ", 1) if thing.startswith("my ") else thing
            ask = rng.choice([f"What is {thing}?", f"Do you know {thing}?", f"Tell me {thing}.",
                              f"{thing[0].upper()}{thing[1:]}?"])  # fmt: skip
            lead = rng.choice([f" {other[0].upper()}{other[1:]} is", " It is", ""])
            pieces = [(f"user: {ask}\nassistant:{lead}", TEXT), (f" {value}", ANSWER),
                      (".\n", ANSWER)]  # fmt: skip
            if not writer.add_if_room(pieces, 1):
                break
            used += 1
        else:
            writer.add("user:")
            _fill(rng, writer, corpus, 70, rng.randint(20, max(30, writer.length // 4)))
            writer.add(rng.choice(["\nassistant: I see.\n", "\nassistant: Go on.\n"]))
    writer.add([EOS], TEXT)


def text(rng: Rng, writer: Writer, corpus: Corpus, names: Names) -> None:
    """A stretch of a novel."""
    at = rng.randrange(len(corpus.tokens) - writer.room)
    writer.add(corpus.tokens[at : at + writer.room].tolist())
