# SPDX-License-Identifier: Apache-2.0
"""What the generators promise: answers can be found, held-out things never occur."""

import random

import pytest

from training.corpus import held_out_word, training_files
from training.data.batches import FAMILIES, Batches, stretch
from training.data.recall import ask_all
from training.data.styles import FAMILIES as STYLES
from training.data.styles import HELD_OUT_WORDINGS, draw_style
from training.data.writer import ANSWER, Writer
from training.presets import MIX

ROWS = 40


@pytest.fixture(scope="module")
def batches(prepared) -> Batches:
    _, tokenizer, corpus, names = prepared
    return Batches(tokenizer, corpus, names, seed=1, context=256, stretched=0.5)


def answers(writer: Writer, tokenizer) -> list[tuple[str, str]]:
    """(all text before an answer, the answer) for every answer of a row."""
    found, i = [], 0
    while i < len(writer.ids):
        j = i
        while j < len(writer.ids) and writer.marks[j] == writer.marks[i]:
            j += 1
        if writer.marks[i] == ANSWER:
            found.append((tokenizer.decode(writer.ids[:i]), tokenizer.decode(writer.ids[i:j])))
        i = j
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_fit_and_begin_with_bos(batches: Batches, family: str) -> None:
    rng = random.Random(family)
    for length in (128, 300):
        for _ in range(ROWS):
            row = batches.row(rng, length, {family: 1})
            assert len(row.ids) == len(row.marks) <= length
            assert row.ids[0] == 1
            assert 1 not in row.ids[1:]


@pytest.mark.parametrize("family", ["recall", "several", "tracking", "frequent", "chat"])
def test_answers_are_in_the_context(batches: Batches, family: str) -> None:
    rng, seen = random.Random(family), 0
    for _ in range(ROWS):
        row = batches.row(rng, 300, {family: 1})
        for before, answer in answers(row, batches.tokenizer):
            for part in answer.replace("</s>", "").strip(" .,;/!'\")]>\n").split(", "):
                # What ends an answer may be a word of the record ("nonsense" style).
                assert part.split("\n")[0].rsplit(" ", 1)[0].strip("'\".") in before
                seen += 1
    assert seen > ROWS


def test_questions_ask_for_the_value_of_their_key(prepared) -> None:
    _, tokenizer, _, names = prepared
    for seed in range(60):
        rng = random.Random(seed)
        style = draw_style(rng, names.words)
        records = [("alphakey", "1234"), ("betakey", "9876")]
        writer = Writer(tokenizer, 400)
        ask_all(rng, writer, style, records, most=2)
        text = tokenizer.decode(writer.ids)
        first, second = sorted((text.index(v), k) for k, v in records[::1] for v in [v])
        for (at, key), start in ((first, 0), (second, first[0])):
            value = dict(records)[key]
            assert key in text[start:at], f"{value} does not follow its key: {text}"


def test_pieces_are_cut_where_the_tokenizer_cuts(batches: Batches) -> None:
    tokenizer = batches.tokenizer
    rng, same = random.Random(3), 0
    for _ in range(100):
        row = batches.row(rng, 256, {"recall": 1})
        whole = tokenizer(tokenizer.decode(row.ids[1:])).input_ids
        same += whole == row.ids
    # Filler that is cut at a quotation mark is the exception.
    assert same >= 95


def test_held_out_wordings_words_and_novels_do_not_occur(batches: Batches, novels) -> None:
    rng = random.Random(4)
    text = "".join(
        batches.tokenizer.decode(batches.row(rng, 256, dict.fromkeys(MIX, 1)).ids)
        for _ in range(300)
    )
    assert not [w for w in HELD_OUT_WORDINGS if w.lower() in text.lower()]
    assert "Doyle_Hound_1902" not in [p.stem for p in training_files(novels)]
    assert "xylophone" not in text
    assert not [w for w in batches.names.words if held_out_word(w)]


def test_every_style_is_drawn(prepared) -> None:
    names = prepared[3]
    openers = {type(draw_style(random.Random(i), names.words)) for i in range(20)}
    assert openers
    assert set(STYLES) == {"prose", "table", "mapping", "plain", "nonsense"}


def test_stretched_positions_increase_within_the_context() -> None:
    for seed in range(50):
        positions = stretch(random.Random(seed), 64, 256)
        assert (positions[1:] > positions[:-1]).all()
        assert positions[0] == 0
        assert positions[-1] < 256


def test_batches_depend_on_seed_and_step_only(batches: Batches) -> None:
    first, again = (batches.batch(7, 128, 512, MIX) for _ in range(2))
    assert first.ids.equal(again.ids)
    assert first.positions.equal(again.positions)
    assert not first.ids.equal(batches.batch(8, 128, 512, MIX).ids)
