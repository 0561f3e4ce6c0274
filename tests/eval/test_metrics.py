# SPDX-License-Identifier: Apache-2.0
"""Metrics, by examples worked out by hand."""

import pytest

from ems_vllm.eval.questions.metrics import METRICS

CLASSES = ("City", "Other location", "location", "Country")


@pytest.mark.parametrize(
    ("name", "output", "references", "score"),
    [
        ("string_match_all", "They are 12 and 34.", ("12", "34", "56"), 2 / 3),
        ("string_match_all", "ABC", ("abc",), 1),
        ("string_match_all", "", ("12",), 0),
        ("string_match_part", "They are 12 and 34.", ("99", "34"), 1),
        ("string_match_part", "nothing", ("99", "34"), 0),
        ("first_number", " <4711>, or 12", ("4711",), 1),
        ("first_number", " 12, or 4711", ("4711",), 0),
        ("first_number", "none", ("4711",), 0),
        # Words: {big, red, dog} and {red, dog, barks, loudly}; precision 2/3, recall 2/4.
        ("token_f1", "The big, red dog!", ("a red dog barks loudly",), 4 / 7),
        # The better of two references.
        ("token_f1", "red dog", ("cat", "red dog"), 1),
        ("token_f1", "", ("cat",), 0),
        ("token_f1", "the", ("the",), 0),
        ("token_f1_first_line", "\nred dog\nred cat", ("red cat",), 0.5),
        # The longest common subsequence is "the cat"; 2 of 3 words either way.
        ("rouge_l", "the cat sat", ("the cat ran",), 2 / 3),
        ("rouge_l", "", ("the cat ran",), 0),
        ("rouge_l", "...", ("the cat ran",), 0),
        ("rouge_l_first_line", "the cat ran\nand more of it", ("the cat ran",), 1),
        # Two classes named, one of them right.
        ("classification_first_line", "City or Country", ("City",), 1 / 2),
        # "location" is a part of the right one's name and does not count.
        ("classification_first_line", "Other location", ("Other location",), 1),
        ("classification_first_line", "Country", ("City",), 0),
        ("classification_first_line", "none\nCity", ("City",), 0),
        ("retrieval", "Paragraph 7, not 8", ("Paragraph 7",), 1 / 2),
        ("retrieval", "Paragraph 17", ("Paragraph 7",), 0),
        ("count", "There are 4", ("4",), 1),
        ("count", "four", ("4",), 0),
        # 4 of 5 + 5 characters in common, in order: 80 %.
        ("code_similarity", "# a comment\nabcde\nmore", ("abxde",), 0.8),
        ("code_similarity", "", ("abc",), 0),
        ("code_similarity", "`only marks`", ("abc",), 0),
    ],
)
def test_by_hand(name, output, references, score):
    assert METRICS[name](output, references, CLASSES) == pytest.approx(score, abs=1e-6)


def test_every_score_of_a_right_answer_is_one():
    for name, metric in METRICS.items():
        right = {"retrieval": "Paragraph 3", "count": "3", "first_number": "3"}.get(name, "City")
        assert metric(right, (right,), CLASSES) == pytest.approx(1, abs=1e-6), name
