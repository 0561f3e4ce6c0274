# SPDX-License-Identifier: Apache-2.0
"""What a traffic file may hold, and how what it may not is refused."""

import json
from functools import cache
from pathlib import Path

import pytest

from ems_vllm.advise.traffic import OutputFrom, read_traffic
from ems_vllm.config import ConfigError
from ems_vllm.eval.questions.tokenizer import HubTokenizer

LLAMA = str(Path(__file__).resolve().parents[2] / "models" / "random-llama")
MESSAGES = [{"role": "user", "content": "Who came in?"}]


@cache
def tokenizer():
    return HubTokenizer(LLAMA)


def read(tmp_path, *lines, output_len=99):
    path = tmp_path / "traffic.jsonl"
    path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines) + "\n")
    return read_traffic(path, tokenizer, output_len)


def none_needed():
    raise AssertionError("lengths need no tokenizer")


def test_texts_are_tokenised_as_the_evaluation_does_it(tmp_path):
    chat, text, ids = read(
        tmp_path,
        {"custom_id": "1", "body": {"messages": MESSAGES, "max_tokens": 7}},
        {"prompt": "Who came in?", "completion": "A man with a stick."},
        {"prompt": [5, 6, 7], "max_completion_tokens": 3},
    )
    rendered = tokenizer().render_chat(MESSAGES)
    assert chat.token_ids == tuple(tokenizer().encode_plain(rendered))
    assert (chat.prompt_len, chat.output_len) == (len(chat.token_ids), 7)
    assert chat.output_from is OutputFrom.BOUND
    assert text.token_ids == tuple(tokenizer().encode("Who came in?"))
    assert text.output_len == len(tokenizer().encode_plain("A man with a stick."))
    assert text.output_from is OutputFrom.RECORDED
    assert (ids.token_ids, ids.prompt_len, ids.output_len) == ((5, 6, 7), 3, 3)


def test_parts_of_a_message_are_its_text_and_calls_of_tools_are_none(tmp_path):
    parts = [{"type": "text", "text": "Who came"}, {"type": "text", "text": "in?"}]
    call = {"function": {"name": "look", "arguments": '{"at": "door"}'}}
    (found,) = read(
        tmp_path,
        {
            "messages": [
                {"role": "user", "content": parts},
                {"role": "assistant", "content": None, "tool_calls": [call]},
            ]
        },
    )
    written = [
        {"role": "user", "content": "Who came\nin?"},
        {"role": "assistant", "content": ""},
    ]
    rendered = tokenizer().render_chat(written)
    assert found.token_ids == tuple(tokenizer().encode_plain(rendered))


def test_lengths_are_read_wherever_servers_write_them(tmp_path):
    path = tmp_path / "log.jsonl"
    usage = {"prompt_tokens": 30, "completion_tokens": 4, "total_tokens": 34}
    lines = [
        {"arrival_time": 12.5, "prompt_tokens": 10, "completion_tokens": 2, "status": 200},
        {"created": 11, "usage": usage, "choices": []},
        {"arrival_time": 13, "response": {"body": {"usage": usage}}},
        {"arrival_time": 14, "prompt_tokens": 5},
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    found = read_traffic(path, none_needed, 99)
    assert [(one.prompt_len, one.output_len) for one in found] == [
        (30, 4), (10, 2), (30, 4), (5, 99)
    ]  # fmt: skip
    # By arrival, from the first on.
    assert [one.arrival for one in found] == [0, 1.5, 2, 3]
    assert [one.output_from for one in found][2:] == [OutputFrom.RECORDED, OutputFrom.ASSUMED]


def test_recorded_lengths_of_answers_win(tmp_path):
    usage = {"prompt_tokens": 999, "completion_tokens": 500}
    (found,) = read(tmp_path, {"prompt": "Who?", "completion": "He.", "usage": usage})
    assert found.output_len == 500
    assert found.prompt_len == len(tokenizer().encode("Who?"))


def test_times_may_be_dates(tmp_path):
    first, second = read(
        tmp_path,
        {"arrival_time": "2026-01-31T12:00:01+01:00", "prompt_tokens": 1},
        {"arrival_time": "2026-01-31T11:00:03.5Z", "prompt_tokens": 1},
    )
    assert (first.arrival, second.arrival) == (0, 2.5)


IMAGE = [{"type": "image_url", "image_url": {"url": "x"}}]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{prompt: 1}", "is not JSON: write one object a line"),
        ("[1]", "is no object: write one with prompt, messages or prompt_tokens"),
        ({"body": {"model": "m"}}, "says neither what was asked nor how long it was: give prompt"),
        ({"prompt": "a", "messages": MESSAGES}, "two requests: give one of them"),
        ({"prompt": ""}, "prompt='' is not allowed: give a text or a list of token ids"),
        ({"prompt": ["a", "b"]}, "several requests; write a line for each"),
        ({"prompt": "a", "n": 4}, "n=4 is not allowed: it stands for several requests"),
        ({"messages": [{"role": "user"}]}, "every message needs a role and a content"),
        ({"messages": [{"role": "user", "content": IMAGE}]}, "only text can be replayed"),
        ({"messages": []}, "give a list of messages"),
        ({"prompt_tokens": 0}, "prompt_tokens=0 is not allowed"),
        ({"prompt_tokens": 5, "completion_tokens": -1}, "completion_tokens=-1 is not allowed"),
        ({"prompt_tokens": 5, "arrival_time": "noon"}, "give seconds, or a time like 2026"),
        ({"prompt_tokens": 5, "arrival_time": 1}, None),
    ],
)  # fmt: skip
def test_another_line_is_refused_by_its_number(tmp_path, line, said):
    good = {"prompt_tokens": 5, "arrival_time": 0}
    if said is None:
        assert len(read(tmp_path, good, line)) == 2
        return
    with pytest.raises(ConfigError) as refused:
        read(tmp_path, good, "", line)
    assert f"{tmp_path / 'traffic.jsonl'} line 3: " in str(refused.value)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_times_are_of_all_lines_or_of_none(tmp_path):
    with pytest.raises(ConfigError, match=r"line 2: arrival_time is missing.* all lines or to no"):
        read(tmp_path, {"prompt_tokens": 5, "arrival_time": 3}, {"prompt_tokens": 5})


def test_a_template_that_fails_is_refused_by_the_line(tmp_path):
    class Refusing:
        def render_chat(self, messages, tools):
            raise TypeError("roles must alternate")

    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps({"messages": MESSAGES}))
    with pytest.raises(
        ConfigError, match=r"line 1: messages cannot .*\(roles must alternate\): gi"
    ):
        read_traffic(path, Refusing, 1)


def test_files_without_requests_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="holds no request"):
        read(tmp_path, "")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_traffic(tmp_path / "missing.jsonl", none_needed, 1)
