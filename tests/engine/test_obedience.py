# SPDX-License-Identifier: Apache-2.0
"""A worker does what the scheduler says, whoever calls it, and refuses what it cannot follow."""

from __future__ import annotations

import pickle
from dataclasses import replace
from unittest import mock

import pytest
from engine.harness import engine, tokens

from ems_vllm.engine.orders import (
    Compaction,
    RecordedQueries,
    ScoredChunk,
    StepOrders,
    attach,
    attached,
)
from ems_vllm.engine.worker.requests import StepRefused, WorkerRequests

pytestmark = pytest.mark.slow

COMPRESSION = {
    "recipe": "knorm",
    "budget": 64,
    "recent_window": 32,
    "recompress_interval": 64,
    "min_blocks_saved": 1,
}
PROMPTS = [tokens(length, seed=length) for length in (420, 380, 400, 350, 300, 410)]
OPTIONS = {"max_model_len": 768, "num_blocks": 60}


def first_compaction(**changes):
    order = Compaction(
        req_id="a",
        group_id=0,
        first_before=0,
        first=6,
        tail=10,
        num_computed=180,
        block_ids=list(range(1, 13)),
        score_pages=[],
        num_scored=0,
        num_represented=0,
        ring_row=-1,
        prompt_blocks=0,
        num_queries=0,
    )
    return order._replace(**changes)


class TestResidents:
    """What a worker checks before it touches the cache."""

    @pytest.fixture
    def residents(self):
        residents = WorkerRequests()
        residents.begin_step(StepOrders(7, admitted=["a", "b"]))
        return residents

    def test_steps_follow_each_other(self, residents):
        with pytest.raises(StepRefused, match=r"a step came.*a step without"):
            residents.begin_step(None)
        with pytest.raises(StepRefused, match="the scheduler expects 8, this worker has 7"):
            residents.begin_step(StepOrders(9))
        with pytest.raises(StepRefused, match="steps do not follow"):
            residents.begin_step(StepOrders(7))
        residents.begin_step(StepOrders(8))

    def test_requests_begin_and_end_once(self, residents):
        with pytest.raises(StepRefused, match="request a begins"):
            residents.begin_step(StepOrders(8, admitted=["a"]))
        with pytest.raises(StepRefused, match="request c ended"):
            residents.begin_step(StepOrders(9, ended=["c"]))
        # A preempted request ends, and may begin again with the next message.
        residents.begin_step(StepOrders(10, ended=["a"], admitted=["a"]))
        assert len(residents) == 2

    def test_a_compaction_starts_from_what_is_there(self, residents):
        residents.compact([first_compaction()])
        residents.check_first_columns(["b", "a"], StepOrders(7, first_columns={0: [0, 6]}))
        with pytest.raises(StepRefused, match=r"request a.*expects first column 0.*has .* 6"):
            residents.compact([first_compaction()])
        with pytest.raises(StepRefused, match=r"request a.*expects first column 5.*has .* 6"):
            residents.compact([first_compaction(first_before=5, first=10, tail=14)])

    def test_what_is_attended_to_is_compressed_as_the_scheduler_believes(self, residents):
        residents.compact([first_compaction()])
        with pytest.raises(StepRefused, match=r"request b, group 0, is attended to.*column 6"):
            residents.check_first_columns(["a", "b"], StepOrders(7, first_columns={0: [6, 6]}))
        with pytest.raises(StepRefused, match="2 requests"):
            residents.check_first_columns(["a"], StepOrders(7, first_columns={0: [6, 0]}))

    def test_a_row_belongs_to_one_request_until_its_compaction(self, residents):
        residents.recorded(RecordedQueries("a", 3, 16), end=180)
        with pytest.raises(StepRefused, match=r"request b .* row 3.*request a"):
            residents.recorded(RecordedQueries("b", 3, 16), end=100)
        with pytest.raises(StepRefused, match=r"by its queries.*\(3, 181\)"):
            residents.compact([first_compaction(ring_row=3, num_queries=16, num_computed=181)])
        residents = WorkerRequests()
        residents.begin_step(StepOrders(7, admitted=["a", "b"]))
        residents.recorded(RecordedQueries("a", 3, 16), end=180)
        residents.compact([first_compaction(ring_row=3, num_queries=16)])
        residents.recorded(RecordedQueries("b", 3, 16), end=100)
        # Whoever ends gives its row back too.
        residents.begin_step(StepOrders(8, ended=["b"]))
        residents.recorded(RecordedQueries("a", 3, 16), end=200)

    def test_a_prompt_scores_without_gaps(self, residents):
        chunk = ScoredChunk("a", 0, 100, 140, 0, 0, list(range(1, 10)), [])
        residents.scored(chunk)
        with pytest.raises(StepRefused, match=r"request a.*queries up to 150.*has 140"):
            residents.scored(chunk._replace(first_query=150, seq_len=180, num_accumulated=150))
        with pytest.raises(StepRefused, match="by its prompt's queries"):
            residents.compact([first_compaction(num_scored=160)])
        residents.scored(chunk._replace(first_query=140, seq_len=180, num_accumulated=140))
        residents.compact([first_compaction(num_scored=160)])


def test_orders_travel_with_the_output():
    """To other processes and other machines a SchedulerOutput is pickled."""
    from vllm.v1.core.sched.output import SchedulerOutput

    output = SchedulerOutput.make_empty()
    assert attached(output) is None
    orders = StepOrders(
        3,
        ended=["x"],
        admitted=["a"],
        starts=[160],
        first_columns={0: [6]},
        compactions=[first_compaction()],
        scored=[ScoredChunk("a", 0, 100, 140, 0, 0, [1, 2], [900])],
        recorded=[RecordedQueries("a", 3, 16)],
    )
    attach(output, orders)
    assert attached(pickle.loads(pickle.dumps(output))) == orders


@pytest.fixture(scope="module")
def answers():
    with engine(COMPRESSION, **OPTIONS) as probe:
        return probe.generate(PROMPTS, 80)


def test_an_executor_that_calls_the_runner_itself_is_obeyed_too(answers):
    """As Ray's does. Blocks are scarce, so columns that were given back are overwritten."""
    with engine(COMPRESSION, **OPTIONS) as probe:
        wrapper = probe.llm.llm_engine.model_executor.driver_worker
        runner = probe.worker.model_runner
        wrapper.execute_model = lambda output: runner.execute_model(output, None)
        assert probe.generate(PROMPTS, 80) == answers
        assert probe.stats()["num_compactions"] > 6


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda orders: None, "a step without"),
        (lambda orders: replace(orders, step=orders.step - 1), "steps do not follow"),
        (lambda orders: replace(orders, compactions=[]), "is attended to"),
    ],
    ids=["lost", "for another step", "without its compactions"],
)
def test_a_step_that_cannot_be_followed_is_refused(edit, message):
    """An error that names what is wrong, and not somebody else's answer."""
    with engine(COMPRESSION, **OPTIONS) as probe:
        probe.generate(PROMPTS[:1], 4)
        schedule = probe.scheduler.schedule

        def tampered(*args, **kwargs):
            output = schedule(*args, **kwargs)
            attach(output, edit(attached(output)))
            return output

        with (
            mock.patch.object(probe.scheduler, "schedule", tampered),
            pytest.raises(StepRefused, match=message),
        ):
            probe.generate(PROMPTS[1:2], 4)


def test_a_batch_of_which_nobody_was_told_is_refused():
    with engine(COMPRESSION, **OPTIONS) as probe:
        runtime, runner = probe.worker.compression, probe.worker.model_runner
        update = runner._update_states

        def forget(output):
            runtime._step.index.clear()
            return update(output)

        with (
            mock.patch.object(runner, "_update_states", forget),
            pytest.raises(StepRefused, match="a batch runs"),
        ):
            probe.generate(PROMPTS[:1], 4)
