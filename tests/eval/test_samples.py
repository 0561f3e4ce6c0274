# SPDX-License-Identifier: Apache-2.0
"""Samples fit, are determined by their key alone, and hold what they ask for."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ems_vllm.config import ConfigError
from ems_vllm.eval.fitting import largest_fitting
from ems_vllm.eval.sample import Key, generator
from ems_vllm.eval.tasks import TASKS, TaskOptions

NEEDLES = [name for name in TASKS if name.startswith("niah")]


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


@pytest.mark.parametrize("name", NEEDLES)
@given(length=st.integers(700, 2500), seed=st.integers(0, 5), index=st.integers(0, 9))
def test_prompts_fit_closely_and_hold_the_answer(tokenizer, name, length, seed, index):
    sample = TASKS.get(name)().sample(Key(name, length, seed, index), tokenizer)
    used = len(sample.prompt_token_ids) + sample.max_tokens
    # A line of the haystack is at most some hundred tokens.
    assert length - 120 < used <= length
    assert list(sample.prompt_token_ids) == tokenizer.encode(sample.prompt)
    assert sample.references
    assert all(reference in sample.prompt for reference in sample.references)


@pytest.mark.parametrize("name", list(TASKS))
def test_samples_depend_on_their_key_alone(tokenizer, name):
    task = TASKS.get(name)()
    three = list(task.samples(1500, 1, 3, tokenizer))
    assert list(task.samples(1500, 1, 2, tokenizer)) == three[:2]
    assert task.sample(Key(name, 1500, 1, 2), tokenizer) == three[2]
    other = next(iter(task.samples(1500, 2, 1, tokenizer)))
    assert other != three[0]
    assert len({sample.prompt or sample.turns for sample in three}) == 3


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
