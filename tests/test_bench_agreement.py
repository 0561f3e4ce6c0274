# SPDX-License-Identifier: Apache-2.0
"""bench_agreement.py: vLLM is asked what transformers is asked, a question that comes later too."""

import bench_agreement
import pytest

from ems_vllm.config import RequestOptions
from ems_vllm.eval.records.prompt_files import PromptLine
from ems_vllm.eval.transformers_engine.answer import Vocabulary

EOS, STOP = 2, 9
VOCABULARY = Vocabulary(lambda ids: " ".join(map(str, ids)), {EOS})


def prompt(*written):
    return PromptLine(
        task="niah",
        length=64,
        seed=0,
        index=0,
        depth=0.5,
        prompt="",
        prompt_token_ids=(1, 3, 4),
        written_token_ids=written,
        max_tokens=8,
        stop=(str(STOP),),
        references=("5",),
    )


def test_a_later_question_is_prescribed_and_no_part_of_the_answer():
    # With the end of the user's turn, as in a chat template.
    line = prompt(6, EOS, 7)
    asked = bench_agreement.sampling(line, RequestOptions(budget=32))
    assert asked["extra_args"] == {"kv_budget": 32, "forced_token_ids": [6, EOS, 7]}
    assert asked["max_tokens"] == 3 + 8
    assert asked["ignore_eos"]
    assert bench_agreement.answer(line, [6, EOS, 7, 5, 8, EOS, 5], VOCABULARY) == "5 8"
    assert bench_agreement.answer(line, [6, EOS, 7, 5, STOP, 5], VOCABULARY) == "5 "


def test_an_engine_that_was_not_asked_is_no_answer():
    with pytest.raises(ValueError, match="did not write"):
        bench_agreement.answer(prompt(6, EOS, 7), [6, EOS], VOCABULARY)


def test_other_prompts_end_where_the_model_ends_them():
    asked = bench_agreement.sampling(prompt(), RequestOptions(enabled=False))
    assert asked["extra_args"] == {"kv_compression": "off"}
    assert (asked["max_tokens"], asked["ignore_eos"]) == (8, False)
    assert bench_agreement.answer(prompt(), [5, 8], VOCABULARY) == "5 8"
