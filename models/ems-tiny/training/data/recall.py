# SPDX-License-Identifier: Apache-2.0
"""Records in a text, dense or far apart, and questions about them."""

from training.corpus import Corpus
from training.data.filler import FILLERS, draw_filler
from training.data.names import KEY_KINDS, VALUE_KINDS, Names, Rng, draw
from training.data.styles import Style, draw_style
from training.data.writer import ANSWER, TEXT, Writer
from training.tokenizer import EOS


def ask_all(
    rng: Rng, writer: Writer, style: Style, records: list[tuple[str, str]], most: int
) -> None:
    """Append questions in random order until there is no room, or `most` were asked."""
    order = rng.sample(records, len(records))
    while len(order) < most and len(records) > 1:
        order += rng.sample(records, len(records))
    for i, (key, value) in enumerate(order[:most]):
        ask, answer, end = style.query(rng, key, value)
        if i == 0:
            # The first question follows the list, which ended with a line break already.
            ask = ask.removeprefix("\n")
        if not writer.add_if_room([(ask, TEXT), (answer, ANSWER), (end, ANSWER)], reserve=1):
            break
    writer.add([EOS], ANSWER)


def recall(rng: Rng, writer: Writer, corpus: Corpus, names: Names) -> None:
    """One sequence: opener, records with or without filler, questions."""
    style = draw_style(rng, names.words)
    keys = names.keys(rng, draw(rng, KEY_KINDS))
    value = names.maker(rng, draw(rng, VALUE_KINDS), names.words)
    kind = draw_filler(rng) if style.filler else "none"
    if writer.length < 192 and rng.random() < 0.5:
        kind = "none"
    writer.add(style.opener)
    whole = writer.room
    # Short sequences ask about much of what they hold: recall is learned from many answers.
    share = rng.uniform(0.25, 0.6) if whole < 1024 else rng.uniform(0.06, 0.35)
    reserve = max(int(whole * share), 40)
    records: list[tuple[str, str]] = []
    if kind == "none":
        few = rng.random() < 0.1
        writer.add(style.open)
        for key in keys:
            pair = (key, value())
            glue = style.glue if records else ""
            if not writer.add_if_room([(glue + style.record(*pair), TEXT)], reserve):
                break
            records.append(pair)
            if few and len(records) == 3:
                break
        writer.add(style.close)
    else:
        filler = FILLERS[kind](rng, writer, corpus)
        # Between one record in a long text and one after every other sentence.
        many = rng.random() < 0.6
        gap = rng.uniform(15, 80) if many else whole / rng.choice([1, 2, 3, 4, 6, 8, 12])
        due = rng.uniform(0, gap) if many else rng.uniform(0, 0.8) * min(gap, whole - reserve)
        start = len(writer.ids)
        newline = style.glue == "\n"
        for piece in filler:
            if len(writer.ids) - start >= due:
                pair = (next(keys), value())
                text = style.record(*pair)
                text = f"\n{text}\n" if newline else style.glue + text
                if not writer.add_if_room([(text, TEXT)], reserve):
                    break
                records.append(pair)
                due += gap * rng.uniform(0.5, 1.5)
            if len(piece) + reserve > writer.room:
                break
            writer.add(piece)
        if not records:
            pair = (next(keys), value())
            if writer.add_if_room([(style.glue + style.record(*pair), TEXT)], 20):
                records.append(pair)
        writer.add("\n")
    if records:
        ask_all(rng, writer, style, records, rng.choice([2 * len(records), len(records), 60]))


def several_values(rng: Rng, writer: Writer, corpus: Corpus, names: Names) -> None:
    """Keys with two to four values each, or questions about several keys at once."""
    style = draw_style(rng, names.words)
    while not style.filler:
        style = draw_style(rng, names.words)
    keys = names.keys(rng, draw(rng, KEY_KINDS))
    value = names.maker(rng, draw(rng, VALUE_KINDS), names.words)
    chosen = [next(keys) for _ in range(rng.randint(2, 6))]
    owned: dict[str, list[str]] = {k: [] for k in chosen}
    todo = [k for k in chosen for _ in range(rng.randint(1, 4))]
    rng.shuffle(todo)
    writer.add(style.opener)
    filler = FILLERS[rng.choice(["noise", "novel"])](rng, writer, corpus)
    gap = max(0, writer.room - 60 * len(todo)) / (len(todo) + 1) * rng.uniform(0.2, 0.9)
    due, start = gap * rng.random(), len(writer.ids)
    for key in todo:
        drawn = value()
        if not writer.add_if_room([("\n" + style.record(key, drawn) + "\n", TEXT)], 60):
            break
        owned[key].append(drawn)
        due += gap
        while len(writer.ids) - start < due:
            piece = next(filler)
            if len(piece) + 60 > writer.room:
                break
            writer.add(piece)
    asks = [k for k in chosen if owned[k]]
    for key in rng.sample(asks, len(asks)):
        ask, first, _ = style.query(rng, key, owned[key][0])
        rest = "".join(f", {v}" for v in owned[key][1:])
        if not writer.add_if_room([(ask, TEXT), (first + rest + ".\n", ANSWER)], 1):
            break
    writer.add([EOS], ANSWER)
