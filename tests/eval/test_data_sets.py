# SPDX-License-Identifier: Apache-2.0
"""Tasks that read public data sets, from files in the data sets' own forms."""

import json
import zipfile

import pytest

from ems_vllm.config import ConfigError
from ems_vllm.eval.questions.sample import Key
from ems_vllm.eval.questions.tasks import TASKS, TaskOptions
from ems_vllm.eval.questions.tasks.longbench import PREFIX


@pytest.fixture
def squad(tmp_path):
    paragraphs = [
        {
            "context": f"Town {i} has {i}00 people.",
            "qas": [
                {"question": f"How many live in town {i}?", "answers": [{"text": f"{i}00"}]},
                {"question": "Who?", "answers": [], "is_impossible": True},
            ],
        }
        for i in range(40)
    ]
    data = {"data": [{"paragraphs": paragraphs[:20]}, {"paragraphs": paragraphs[20:]}]}
    (tmp_path / "dev-v2.0.json").write_text(json.dumps(data))
    return TaskOptions(data_path=tmp_path)


@pytest.fixture
def hotpot(tmp_path):
    data = [
        {
            "question": f"Who wrote {i}?",
            "answer": f"Author {i}",
            "context": [[f"Book {i}", ["It was written", f" by author {i}."]], ["Other", ["No."]]],
        }
        for i in range(30)
    ]
    (tmp_path / "hotpotqa.json").write_text(json.dumps(data))
    return TaskOptions(data_path=tmp_path)


def test_squad_question_comes_with_its_document_and_as_many_others_as_fit(tokenizer, squad):
    small = TASKS.get("qa_1")(squad).sample(Key("qa_1", 260, 0, 0), tokenizer)
    large = TASKS.get("qa_1")(squad).sample(Key("qa_1", 500, 0, 0), tokenizer)
    assert small.references == large.references
    town = small.references[0].removesuffix("00") or "0"
    for sample in (small, large):
        assert f"Town {town} has {sample.references[0]} people." in sample.prompt
        assert f"How many live in town {town}?" in sample.prompt
        assert "Who?" not in sample.prompt
        assert len(sample.prompt_token_ids) + sample.max_tokens <= sample.length
    assert large.prompt.count("Document ") > small.prompt.count("Document ") > 1


def test_all_documents_and_no_more(tokenizer, squad):
    sample = TASKS.get("qa_1")(squad).sample(Key("qa_1", 20000, 0, 0), tokenizer)
    assert sample.prompt.count("Document ") == 40
    assert sample.budget_length == len(sample.prompt_token_ids) + sample.max_tokens < 20000


def test_a_seed_goes_through_all_questions(tokenizer, squad):
    samples = TASKS.get("qa_1")(squad).samples(300, 3, 40, tokenizer)
    assert len({sample.references for sample in samples}) == 40


def test_hotpot_documents_are_titled(tokenizer, hotpot):
    sample = TASKS.get("qa_2")(hotpot).sample(Key("qa_2", 400, 0, 0), tokenizer)
    number = sample.references[0].removeprefix("Author ")
    assert f"Book {number}\nIt was written by author {number}." in sample.prompt
    assert TASKS.get("qa_2").score(sample, f"It was author {number}, I think.") == 1


def record(**fields):
    return {"input": "", "context": "word " * 50, "answers": ["yes"], "all_classes": None, **fields}


def test_longbench_prompt_is_the_benchmark_s_and_is_cut_in_the_middle(tokenizer, tmp_path):
    context = " ".join(f"w{i}" for i in range(2000))
    lines = [record(context=context, input="Why?"), record(context="short", input="Why?")]
    (tmp_path / "qasper.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    task = TASKS.get(f"{PREFIX}qasper")(TaskOptions(data_path=tmp_path))
    samples = list(task.samples(1000, 0, 2, tokenizer))
    long = next(sample for sample in samples if "w0 w1" in sample.prompt)
    short = next(sample for sample in samples if sample is not long)
    assert long.max_tokens == 128
    assert 1000 - 10 <= len(long.prompt_token_ids) + long.max_tokens <= 1000
    for sample in (long, short):
        assert sample.prompt.startswith("You are given a scientific article and a question.")
        assert sample.prompt.endswith("Question: Why?\n\nAnswer:")
    assert (long.natural_length, long.budget_length) == (None, 1000)
    assert short.budget_length == len(short.prompt_token_ids) + 128 < 1000
    assert "w1999\n" in long.prompt
    assert "w1000" not in long.prompt
    assert "Article: short\n" in short.prompt


def test_longbench_classes_reach_the_metric(tokenizer, tmp_path):
    line = record(answers=["City"], all_classes=["City", "Country"])
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        archive.writestr("data/trec.jsonl", json.dumps(line) + "\n")
    task = TASKS.get(f"{PREFIX}trec")(TaskOptions(data_path=tmp_path))
    sample = task.sample(Key(f"{PREFIX}trec", 900, 0, 0), tokenizer)
    assert task.score(sample, "City\nType: Country") == 1
    assert task.score(sample, "City, Country") == 0.5


def test_every_longbench_prompt_has_its_places():
    for name in TASKS:
        if name.startswith(PREFIX):
            assert "{context}" in TASKS.get(name).template


@pytest.mark.parametrize("name", ["qa_1", "qa_2", f"{PREFIX}lcc"])
def test_missing_data_is_one_sentence(tokenizer, tmp_path, name):
    # Where no data set is, the benchmark's archive is not one either.
    (tmp_path / "data.zip").write_bytes(b"no archive")
    with pytest.raises(ConfigError) as error:
        TASKS.get(name)(TaskOptions(data_path=tmp_path)).sample(Key(name, 900, 0, 0), tokenizer)
    assert str(error.value).startswith("data_path='")
    assert f"has no data for tasks='{name}'" in str(error.value)


def test_another_file_under_the_name_is_one_sentence(tokenizer, tmp_path):
    (tmp_path / "squad.json").write_text('{"rows": []}')
    with pytest.raises(ConfigError, match=r"is not the data set's file \(KeyError: 'data'\)"):
        TASKS.get("qa_1")(TaskOptions(data_path=tmp_path)).sample(Key("qa_1", 900, 0, 0), tokenizer)
