# SPDX-License-Identifier: Apache-2.0
"""What a CUDA graph would capture stays where it is; compaction and dummy runs keep out of it.

No graph runs on the CPU. A graph replays the addresses and shapes of its capture, so it is these
that the tests follow through a run with prompt chunks, compactions, preemptions and batches of
changing size.
"""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from unittest import mock

import pytest
import torch
from engine.arrivals import Arrival, serve
from engine.harness import engine, tokens

from ems_vllm import ops
from ems_vllm.config.request import RequestOptions
from ems_vllm.cpu_platform.attention import TorchCPUBuilder
from ems_vllm.engine.group.compactor import Compactor
from ems_vllm.policies.policy import Policy

pytestmark = pytest.mark.slow

COMPRESSION = {
    "recipe": "ems",
    "budget": 64,
    "recent_window": 32,
    "recompress_interval": 64,
    "min_blocks_saved": 1,
}
SHARED = tokens(192, seed=9)
# Prompts of one chunk and of many, two with a common prefix, more than the pool holds at once.
ARRIVALS = [
    # These two fall due in the same step.
    Arrival(0, tokens(40, seed=1), 130),
    Arrival(0, tokens(40, seed=2), 130),
    Arrival(0, tokens(410, seed=3), 140),
    Arrival(2, SHARED + tokens(150, seed=4), 90),
    Arrival(30, SHARED + tokens(180, seed=5), 60),
    Arrival(31, tokens(380, seed=6), 100),
    Arrival(60, tokens(5, seed=7), 20),
]


@pytest.fixture(scope="module")
def probe():
    options = {"num_blocks": 38, "max_model_len": 560, "max_num_seqs": 8}
    with engine(COMPRESSION, max_num_batched_tokens=128, **options) as running:
        yield running


def answers_of(probe, before_step=lambda step: None):
    """Answers to ARRIVALS, from an empty prefix cache."""
    assert probe.llm.reset_prefix_cache()
    outputs = serve(probe, ARRIVALS, before_step)
    probe.assert_pool_is_empty()
    return [list(output.outputs[0].token_ids) for output in outputs]


def group_of(probe):
    (group,) = probe.worker.compression.groups
    return group


def address(tensor):
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype


def live_columns_of(probe):
    (rewriter,) = probe.worker.rewriters
    return rewriter.live_columns


def persistent_tensors(probe):
    """Everything of compression that a captured graph would read or write."""
    group, live = group_of(probe), live_columns_of(probe)
    tensors = {
        "ring_slots": group.tensors.query_ring.slots,
        "block_table": live.block_table,
        "seq_lens": live.seq_lens,
        "query_ring": group.tensors.query_ring.queries,
        "scores": group.tensors.scores,
    }
    for index, stack in enumerate(group.tensors.stacks):
        tensors[f"keys {index}"] = stack.key_cache
        tensors[f"values {index}"] = stack.value_cache
    for index, cache in enumerate(probe.worker.model_runner.kv_caches):
        tensors[f"cache {index}"] = cache
    return tensors


def addresses(probe):
    return {name: address(tensor) for name, tensor in persistent_tensors(probe).items()}


@contextmanager
def steps_observed(probe, before, after=lambda: None):
    """Call `before` with every scheduler output, and `after` when its step has run."""
    execute = probe.worker.execute_model

    def observed(output):
        before(output)
        result = execute(output)
        after()
        return result

    with mock.patch.object(probe.worker, "execute_model", observed):
        yield


@contextmanager
def ring_writes(on_write):
    """Call `on_write(query, ring_slots, ring, record)` in place of ops.record_queries."""
    record = ops.record_queries

    def observed(query, ring_slots, ring):
        on_write(query, ring_slots, ring, record)

    with mock.patch.object(ops, "record_queries", observed):
        yield


@dataclass
class Places:
    """Where the tensors of a run were.

    Attributes:
        buffers: All sets of addresses of the persistent tensors.
        metadata: Addresses of (block table, sequence lengths) by number of requests.
        rings: How often the operator was given each ring.
        slots: Addresses of its ring slots.
        chunk_lengths: Tokens that a step processed of a request.
        num_preemptions, num_compactions: In this run.
    """

    answers: list[list[int]] = field(default_factory=list)
    buffers: set = field(default_factory=set)
    metadata: dict[int, set] = field(default_factory=dict)
    rings: Counter = field(default_factory=Counter)
    slots: set = field(default_factory=set)
    chunk_lengths: set[int] = field(default_factory=set)
    num_preemptions: int = 0
    num_compactions: int = 0


@pytest.fixture(scope="module")
def places(probe):
    """Where everything was in the busy run that the docstring of this module promises."""
    found = Places()
    build = TorchCPUBuilder.build

    def look(output=None):
        found.buffers.add(tuple(addresses(probe).items()))
        if output is not None:
            found.chunk_lengths.update(output.num_scheduled_tokens.values())

    def observed_build(self, common_prefix_len, metadata, *args, **kwargs):
        place = (address(metadata.block_table_tensor), address(metadata.seq_lens))
        found.metadata.setdefault(metadata.num_reqs, set()).add(place)
        return build(self, common_prefix_len, metadata, *args, **kwargs)

    def observed_write(query, ring_slots, ring, record):
        found.rings[address(ring)] += 1
        found.slots.add((ring_slots.data_ptr(), len(ring_slots) - len(query)))
        record(query, ring_slots, ring)

    compactions, preemptions = probe.stats()["num_compactions"], probe.num_preemptions
    with (
        steps_observed(probe, look, look),
        mock.patch.object(TorchCPUBuilder, "build", observed_build),
        ring_writes(observed_write),
    ):
        found.answers = answers_of(probe)
    found.num_compactions = probe.stats()["num_compactions"] - compactions
    found.num_preemptions = probe.num_preemptions - preemptions
    return found


def test_the_run_is_busy(places):
    assert set(places.metadata) >= {1, 2, 3, 4}
    assert min(places.chunk_lengths) == 1
    assert max(places.chunk_lengths) > 100
    assert places.num_compactions > len(ARRIVALS)
    assert places.num_preemptions > 0


def test_buffers_never_move(probe, places):
    assert places.buffers == {tuple(addresses(probe).items())}


def test_builder_is_given_views_of_the_buffers(probe, places):
    """For a given batch size always the same addresses and shapes."""
    live = live_columns_of(probe)
    for num_reqs, found in places.metadata.items():
        ((block_table, seq_lens),) = found
        assert seq_lens == address(live.seq_lens[:num_reqs])
        width = block_table[1][1]
        assert block_table == address(live.block_table[:num_reqs, :width])
    assert len({block_table[1][1] for ((block_table, _),) in places.metadata.values()}) == 1


def test_layers_record_into_the_ring_through_the_same_slots(probe, places):
    """What the operator is given inside of the model, where a graph captures it."""
    ring = group_of(probe).tensors.query_ring
    assert places.slots == {(ring.slots.data_ptr(), 0)}
    assert set(places.rings) == {address(queries) for queries in ring.queries}
    assert len(set(places.rings.values())) == 1


class _DueRequests:
    """Which requests a step has to compact, from scheduler outputs and plans alone."""

    def __init__(self, settings, block_size):
        self._settings, self._block_size = settings, block_size
        self._plans, self._first = {}, {}

    def follow(self, output):
        for req_id in output.preempted_req_ids or ():
            self._first[req_id] = 0
        starts = {}
        for new in output.scheduled_new_reqs:
            self._plans[new.req_id] = self._settings.plan(
                len(new.prompt_token_ids), self._block_size, RequestOptions()
            )
            self._first[new.req_id] = 0
            starts[new.req_id] = new.num_computed_tokens
        cached = output.scheduled_cached_reqs
        starts.update(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        due = set()
        for req_id, start in starts.items():
            first, _ = self._plans[req_id].columns(start)
            if first != self._first[req_id]:
                due.add(req_id)
            self._first[req_id] = first
        return due


def test_compaction_runs_once_per_due_step_and_outside_of_the_model(probe):
    group, runner = group_of(probe), probe.worker.model_runner
    due_requests = _DueRequests(group.tensors.spec.settings, group.tensors.spec.block_size)
    forward, compact, run_orders = runner._model_forward, Policy.compact, Compactor.compact
    build = TorchCPUBuilder.build
    # Of the step at hand, what happened in order; of all steps, what was and what had to be done.
    events, num_tokens, num_compacted, num_due = [], [], Counter(), Counter()

    def start(output):
        events.clear()
        due = due_requests.follow(output)
        num_due["rows times layers"] += len(due) * group.tensors.num_layers
        num_due["largest"] = max(num_due["largest"], len(due))
        num_tokens.append(output.total_num_scheduled_tokens)

    def observed_forward(**kwargs):
        events.append("model")
        result = forward(**kwargs)
        events.append("model done")
        return result

    def observed_build(self, *args, **kwargs):
        events.append("metadata")
        return build(self, *args, **kwargs)

    def observed_orders(self, orders):
        events.append("compact")
        return run_orders(self, orders)

    def observed_compact(self, context):
        assert events == ["compact"]
        num_compacted["rows times layers"] += context.num_rows * context.num_layers
        compact(self, context)

    def finish():
        # Nothing that the compaction changes is read before, nothing runs it a second time. A
        # step without tokens only tells of requests that have finished.
        others = ["metadata", "model", "model done"] if num_tokens[-1] else []
        assert events == ["compact", *others]
        assert num_compacted["rows times layers"] == num_due["rows times layers"]

    with (
        steps_observed(probe, start, finish),
        mock.patch.object(runner, "_model_forward", observed_forward),
        mock.patch.object(TorchCPUBuilder, "build", observed_build),
        mock.patch.object(Compactor, "compact", observed_orders),
        mock.patch.object(Policy, "compact", observed_compact),
    ):
        before = probe.stats()["num_compactions"]
        answers_of(probe)
    assert num_due["largest"] >= 2
    total = probe.stats()["num_compactions"] - before
    assert total * group.tensors.num_layers == num_due["rows times layers"]


def state_of(probe):
    """Copies of all that compression knows of live requests, host and device."""
    tensors = {
        name: tensor.clone()
        for name, tensor in persistent_tensors(probe).items()
        if name not in ("ring_slots", "block_table", "seq_lens")
    }
    return tensors, (repr(requests_of(probe)), probe.stats())


def requests_of(probe):
    return probe.worker.compression._requests._requests


def dummy_runs(probe):
    """What vLLM runs without requests: idle data-parallel ranks, warm-up, capture, profiling."""
    runner = probe.worker.model_runner
    probe.worker.execute_dummy_batch()
    runner._dummy_run(1, force_attention=True, uniform_decode=True)
    runner._dummy_run(8, force_attention=True, uniform_decode=True)
    runner._dummy_run(64, force_attention=True, create_mixed_batch=True)
    runner._dummy_run(128, force_attention=True)
    runner.profile_run()


def test_dummy_runs_between_steps_change_nothing(probe, places):
    checked = Counter()

    def interpose(step):
        if step % 20 != 4:
            return
        tensors, known = state_of(probe)
        dummy_runs(probe)
        tensors_after, known_after = state_of(probe)
        assert known_after == known
        for name, tensor in tensors.items():
            assert torch.equal(tensors_after[name], tensor), name
        checked["runs"] += 1
        checked["compressed"] += any(
            first > 0
            for resident in requests_of(probe).values()
            for first in resident.first_columns.values()
        )

    assert answers_of(probe, interpose) == places.answers
    assert checked["runs"] > 6
    assert checked["compressed"] > 3


def test_rows_of_padding_record_nothing(probe):
    """With piecewise graphs the model runs on more rows than the metadata counts."""
    runner = probe.worker.model_runner
    choose = runner._determine_batch_execution_and_padding
    num_tokens, num_padded = [], Counter()

    def padded(*args, **kwargs):
        mode, batch, *others = choose(*args, **kwargs)
        rounded = min(-(-batch.num_tokens // 32) * 32, runner.max_num_tokens)
        return mode, replace(batch, num_tokens=rounded), *others

    def check(query, ring_slots, ring, record):
        expected = ring.clone()
        record(query[: num_tokens[-1]], ring_slots[: num_tokens[-1]], expected)
        record(query, ring_slots, ring)
        assert torch.equal(ring, expected)
        num_padded[len(query) - num_tokens[-1]] += 1

    with (
        mock.patch.object(runner, "_determine_batch_execution_and_padding", padded),
        steps_observed(probe, lambda output: num_tokens.append(output.total_num_scheduled_tokens)),
        ring_writes(check),
    ):
        answers_of(probe)
    assert len(num_padded) > 4
