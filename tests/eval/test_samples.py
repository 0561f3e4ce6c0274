# SPDX-License-Identifier: Apache-2.0
"""Samples fit, are determined by their key alone, and hold what they ask for."""

import json
import re
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ems_vllm.config import ConfigError
from ems_vllm.eval.questions.haystack import read_texts
from ems_vllm.eval.questions.longest_prompt import largest_fitting
from ems_vllm.eval.questions.metrics import METRICS
from ems_vllm.eval.questions.sample import Key, generator
from ems_vllm.eval.questions.tasks import TASKS, TaskOptions

pytestmark = pytest.mark.slow

# Tasks that write their prompts themselves, and those that read public data sets.
READERS = [name for name in TASKS if name.startswith(("longbench_", "qa_"))]
WRITERS = [name for name in TASKS if name not in READERS]
# Their prompts grow in steps of at most so many of the toy tokenizer's tokens.
STEPS = {
    **{name: 120 for name in TASKS if name.startswith("niah")},
    **{"vt": 50, "cwe": 60, "fwe": 60, "kv_retrieval": 70, "lines": 40},
}
LENGTH = 3000


@given(steps=st.lists(st.integers(1, 9), min_size=1, max_size=60), room=st.integers(1, 300))
def test_largest_fitting(steps, room):
    def count(size: int) -> int:
        return sum(steps[:size]) + max(size - len(steps), 0)

    size = largest_fitting(count, room, minimum=1)
    if size is None:
        assert count(1) > room
    else:
        assert count(size) <= room < count(size + 1)


def test_generators_are_told_apart_by_every_part_of_the_key():
    keys = [Key("a", 1, 2, 3), Key("b", 1, 2, 3), Key("a", 2, 2, 3), Key("a", 1, 3, 3)]
    draws = {generator(key).random() for key in keys} | {generator(keys[0], "x").random()}
    assert len(draws) == 5
    assert generator(keys[0]).random() == generator(keys[0]).random()


@pytest.mark.parametrize("name", STEPS)
@given(length=st.integers(1200, 2500), seed=st.integers(0, 5), index=st.integers(0, 9))
def test_prompts_fit_closely_and_hold_the_answer(tokenizer, name, length, seed, index):
    sample = TASKS.get(name)().sample(Key(name, length, seed, index), tokenizer)
    used = len(sample.prompt_token_ids) + sample.max_tokens
    assert length - STEPS[name] < used <= length
    assert list(sample.prompt_token_ids) == tokenizer.encode(sample.prompt)
    assert sample.references
    assert all(reference in sample.prompt for reference in sample.references)


@pytest.mark.parametrize("name", WRITERS)
def test_samples_depend_on_their_key_alone(tokenizer, name):
    task = TASKS.get(name)()
    three = list(task.samples(LENGTH, 1, 3, tokenizer))
    assert list(task.samples(LENGTH, 1, 2, tokenizer)) == three[:2]
    assert task.sample(Key(name, LENGTH, 1, 2), tokenizer) == three[2]
    other = next(iter(task.samples(LENGTH, 2, 1, tokenizer)))
    assert other != three[0]
    assert len({sample.prompt or sample.turns for sample in three}) == 3


IN_ALL = [name for name in WRITERS if len(TASKS.get(name).protocols) == 3]


@pytest.mark.parametrize("name", IN_ALL)
def test_protocols_ask_the_same_about_the_same_document(tokenizer, name):
    task = TASKS.get(name)()
    last, first, later = (
        task.sample(Key(name, LENGTH, 2, 1, protocol), tokenizer)
        for protocol in ("last", "first", "later")
    )
    assert last.references == first.references == later.references
    assert (last.depth, last.choices) == (first.depth, first.choices)
    assert last.gold_token_ids == first.gold_token_ids == later.gold_token_ids
    # The prompt of the last is the document alone.
    document = later.prompt
    assert document in last.prompt
    assert document in first.prompt
    question = tokenizer.decode(later.written_token_ids)
    assert last.prompt.endswith(document + question)
    # Of the question, the tail says nothing.
    tail = first.prompt[first.prompt.index(document) + len(document) :]
    assert 0 < len(tail) < 30
    for sample in (last, first, later):
        used = len(sample.prompt_token_ids) + len(sample.written_token_ids) + sample.max_tokens
        assert used <= LENGTH
    assert last.written_token_ids == first.written_token_ids == ()


def test_the_right_answer_as_tokens(tokenizer):
    sample = TASKS.get("niah")().sample(Key("niah", 900, 0, 0), tokenizer)
    assert tokenizer.decode(sample.gold_token_ids) == f" {sample.references[0]}"
    assert sample.lead_token_ids == ()
    first = TASKS.get("niah")().sample(Key("niah", 900, 0, 0, "first"), tokenizer)
    # As the prompt of "last" ends, from which the same answer follows.
    lead = tokenizer.decode(first.lead_token_ids)
    assert len(lead.split()) > 1
    assert sample.prompt.endswith(lead)
    pair = TASKS.get("kv_retrieval")().sample(Key("kv_retrieval", 900, 0, 0), tokenizer)
    assert tokenizer.decode(pair.gold_token_ids) == f' "{pair.references[0]}"'


def test_near_duplicates_share_the_first_word_of_their_key(tokenizer):
    sample = TASKS.get("niah_near")().sample(Key("niah_near", 1500, 0, 0), tokenizer)
    keys = re.findall(r"numbers for ([a-z-]+) is: \d+", sample.prompt)
    assert len(keys) == len(set(keys)) == 5
    assert len({key.split("-")[0] for key in keys}) == 1


def test_an_example_comes_first_and_has_another_answer(tokenizer):
    sample = TASKS.get("niah_example")().sample(Key("niah_example", 1500, 0, 0, "later"), tokenizer)
    example, document = sample.prompt.split("provided text is", 1)
    number = re.match(r" (\d+)\.", document)[1]
    assert f"is: {number}." in example
    assert sample.references[0] not in example
    assert f"is: {sample.references[0]}." in document


def test_examples_of_a_class_hold_the_noun_but_not_the_sentence(tokenizer):
    sample = TASKS.get("few_shot")().sample(Key("few_shot", 1500, 0, 0, "later"), tokenizer)
    question = tokenizer.decode(sample.written_token_ids)
    asked = re.search(r"Text: (.*)\nLabel:$", question)[1]
    assert asked not in sample.prompt
    labels = re.findall(r"Label: (\w+)", sample.prompt)
    assert set(labels) == set(sample.choices)
    assert sample.references[0] in labels


def test_quoted_passages_go_on_in_the_document(tokenizer):
    for name in ("quotation", "code_completion"):
        sample = TASKS.get(name)().sample(Key(name, 1500, 0, 3, "later"), tokenizer)
        question = tokenizer.decode(sample.written_token_ids)
        given = question.split("\n\n")[-1].strip('"')
        assert " ".join([*given.split(), *sample.references[0].split()]) in " ".join(
            sample.prompt.split()
        )
        assert sample.references[0] not in question
        assert given.strip()


def test_grid_goes_through_the_depths(tokenizer):
    options = TaskOptions(depths=(0.0, 0.5, 1.0))
    samples = list(TASKS.get("niah")(options).samples(1200, 0, 4, tokenizer))
    assert [sample.depth for sample in samples] == [0.0, 0.5, 1.0, 0.0]
    for sample in samples:
        position = sample.prompt.index(sample.references[0]) / len(sample.prompt)
        assert position == pytest.approx(sample.depth, abs=0.25)


def test_too_short_a_length_is_refused(tokenizer):
    with pytest.raises(ConfigError, match=r"lengths=150 is too short for tasks='niah': use at le"):
        TASKS.get("niah")().sample(Key("niah", 150, 0, 0), tokenizer)


def test_options_bound_the_generation(tokenizer):
    task = TASKS.get("niah_single_1")(TaskOptions(max_tokens=20, stop=("\n",)))
    sample = task.sample(Key("niah_single_1", 600, 0, 0), tokenizer)
    assert (sample.max_tokens, sample.stop) == (20, ("\n",))
    assert len(sample.prompt_token_ids) > 480


def test_every_task_has_a_metric_for_its_answers():
    for name in TASKS:
        task = TASKS.get(name)
        assert task.metric in METRICS or not task.higher_is_better or task.follows_full


def test_variables_are_chained_and_the_answer_is_the_whole_chain(tokenizer):
    sample = TASKS.get("vt")().sample(Key("vt", 2000, 0, 0), tokenizer)
    question = sample.prompt[sample.prompt.rindex("Memorize and track") :]
    first, *others = sample.references
    value = re.search(rf"VAR {first} = (\d+)", question)[1]
    assert f"assigned the value {value} in the text" in question
    for before, after in zip(sample.references, others, strict=False):
        assert question.index(f"VAR {after} = VAR {before}") > question.index(f"VAR {before} =")


@pytest.mark.parametrize("length", [2000, 6000])
def test_common_words_are_the_most_common(tokenizer, length):
    sample = TASKS.get("cwe")().sample(Key("cwe", length, 0, 0), tokenizer)
    question = sample.prompt[sample.prompt.rindex("Below is a numbered") :].split("Question:")[0]
    counts = Counter(re.findall(r"\d+\. (\w+)", question))
    common, uncommon = (30, 3) if length >= 4096 else (6, 1)
    assert {word for word, count in counts.items() if count == common} == set(sample.references)
    assert set(counts.values()) == {common, uncommon}


def test_frequent_words_are_the_most_frequent(tokenizer):
    sample = TASKS.get("fwe")().sample(Key("fwe", 2000, 0, 0), tokenizer)
    text = sample.prompt.split("coded words. ")[1].split("\nQuestion:")[0]
    ranked = [word for word, _ in Counter(text.split()).most_common(4)]
    assert ranked[0] == "..."
    assert tuple(ranked[1:]) == sample.references


@pytest.mark.parametrize("name", ["kv_retrieval", "lines"])
def test_what_is_asked_lies_at_its_depth(tokenizer, name):
    for index, depth in enumerate(TaskOptions().depths):
        sample = TASKS.get(name)().sample(Key(name, LENGTH, 0, index), tokenizer)
        position = sample.prompt.index(sample.references[0]) / len(sample.prompt)
        assert sample.depth == depth
        assert position == pytest.approx(depth, abs=0.25)


def test_the_paper_s_number_of_pairs(tokenizer):
    sample = TASKS.get("kv_retrieval_75")().sample(Key("kv_retrieval_75", 4096, 0, 0), tokenizer)
    records = sample.prompt.split("JSON data:\n")[1].split("\n\nKey:")[0]
    asked = re.search(r'Key: "(.*)"', sample.prompt)[1]
    assert len(json.loads(records)) == 75
    assert json.loads(records)[asked] == sample.references[0]


def test_a_continuation_follows_its_prompt(tokenizer):
    sample = TASKS.get("bits_per_byte")().sample(Key("bits_per_byte", 900, 0, 0), tokenizer)
    whole = [*sample.prompt_token_ids, *sample.continuation_token_ids]
    assert (len(whole), len(sample.continuation_token_ids)) == (900, 225)
    text = tokenizer.decode(whole)
    source = read_texts(None)[0]
    assert text in source
    assert sample.continuation_bytes == len(tokenizer.decode(whole[675:]).encode())


def test_a_text_too_short_for_a_continuation_is_refused(tokenizer, tmp_path):
    (tmp_path / "short.txt").write_text("Too short a text.")
    task = TASKS.get("bits_per_byte")(TaskOptions(text_path=tmp_path))
    with pytest.raises(ConfigError, match="no text has so many tokens"):
        task.sample(Key("bits_per_byte", 900, 0, 0), tokenizer)


def test_a_conversation_fits_and_asks_for_what_it_told(tokenizer):
    sample = TASKS.get("multi_turn")().sample(Key("multi_turn", 1500, 0, 0), tokenizer)
    assert len(sample.turns) == 6
    assert sample.references[0] in sample.turns[0]
    assert not any(sample.references[0] in turn for turn in sample.turns[1:])
    asked = re.search(r"number for ([\w-]+),", sample.turns[-1])[1]
    assert f"for {asked} is: {sample.references[0]}." in sample.turns[0]
    messages = [{"role": "user", "content": turn} for turn in sample.turns]
    tokens = len(tokenizer.encode(tokenizer.render_chat(messages)))
    # Five answers of 16 tokens and the last one are to come.
    assert 1500 - 200 < tokens + 5 * 16 + sample.max_tokens <= 1500


def test_what_is_written_for_the_model_holds_the_answer_and_asks_for_it(tokenizer):
    sample = TASKS.get("long_generation")().sample(Key("long_generation", 1500, 0, 1), tokenizer)
    used = len(sample.prompt_token_ids) + len(sample.written_token_ids) + sample.max_tokens
    assert 1500 - 40 < used <= 1500
    written = tokenizer.decode(sample.written_token_ids)
    asked = re.search(r"number of ([\w-]+)\.", sample.prompt)[1]
    assert f"for {asked} is: {sample.references[0]}." in written
    assert written.endswith(f"for {asked} is:")


def test_texts_that_cannot_be_read(tokenizer, tmp_path):
    for path in (tmp_path / "none.txt", tmp_path):
        task = TASKS.get("niah")(TaskOptions(text_path=path))
        with pytest.raises(ConfigError, match=r"^text_path='.*give a text file or a folder of"):
            task.sample(Key("niah", 900, 0, 0), tokenizer)
