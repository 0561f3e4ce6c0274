# SPDX-License-Identifier: Apache-2.0
"""What a request protects stays in the cache as it was computed, for every layer and kv_head."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from engine.arrivals import serve
from engine.harness import BLOCK_SIZE, LLAMA, EngineProbe, engine, tokens
from engine.test_head_budgets import LEVELS, NUM_HEADS, NUM_LAYERS
from engine.unequal_budgets import (
    COMPRESSION,
    LONG,
    LONG_ANSWER,
    OPTIONS,
    SHORT,
    answers,
    answers_of_transformers,
    both,
    disturbed,
    found_by_runner_v2,
    group_stats,
)
from engine.workers import answers_of_workers
from unlike_heads import unlike_heads

from ems_vllm.engine.group.protection import ProtectedEntries

pytestmark = pytest.mark.slow

# With the sinks 43 of the 48 entries that the level which keeps least has room for.
SPANS = ((100, 131), (380, 388))
PROTECT = {"kv_protect": ["100-120", "110-131", "380-388"]}
SHARED = {
    "ems": COMPRESSION,
    "by head, two levels": LEVELS,
    "as it comes": {**COMPRESSION, "prefill_interval": 48},
    "ada": {**COMPRESSION, "allocator": {"name": "ada", "safeguard": 0.0}},
}


@pytest.fixture(scope="class", params=list(SHARED))
def compression(request):
    return SHARED[request.param]


@pytest.fixture(scope="class")
def probe(compression):
    with engine(compression, LLAMA, **OPTIONS) as probe:
        yield probe


@pytest.fixture
def fresh(probe):
    """The engine with nothing in its prefix cache; nothing is remembered afterwards."""
    assert probe.llm.reset_prefix_cache()
    with unlike_heads():
        yield probe
    probe.generate([[1]], 1)
    probe.assert_pool_is_empty()
    assert remembered(probe) == [0 for _ in group_stats(probe)]


def remembered(probe: EngineProbe) -> list[int]:
    """By group, requests of which protected entries are known."""
    return [len(group._compactor.protected) for group in probe.worker.compression.groups]


class Watch:
    """Looks for the keys and values of LONG's protected tokens while it runs.

    Attributes:
        num_missing: By step: entries of these tokens, of any layer and head, that are not in live
            columns as they were computed.
        num_all: How many there are.
        num_remembered: The most requests that any group knew of.
    """

    def __init__(self, probe: EngineProbe) -> None:
        self._probe = probe
        self._managers = {m.kv_cache_group_id: m for m in probe.managers}
        # By span, layer and head, [num_tokens, 2 * head_size].
        self._computed: dict[tuple[int, int], list[list[torch.Tensor]]] = {}
        self.num_missing: list[int] = []
        self.num_all = 0
        self.num_remembered = 0

    def __call__(self, step: int) -> None:
        running = {r.num_prompt_tokens: r for r in self._probe.scheduler.running}
        request = running.get(len(LONG))
        if request is None:
            return
        self.num_remembered = max(self.num_remembered, *remembered(self._probe))
        live = self._entries(request.request_id, None)
        found = [
            (head[:, None] == entries[None]).all(-1).any(1)
            for layers in self._computed.values()
            for layer, of_live in zip(layers, live, strict=True)
            for head, entries in zip(layer, self._of_heads(of_live), strict=True)
        ]
        self.num_missing.append(sum(int((~of_head).sum()) for of_head in found))
        for span in SPANS:
            # As soon as it has been computed; no step runs across a compaction.
            if span not in self._computed and request.num_computed_tokens >= span[1]:
                self._computed[span] = self._entries(request.request_id, span)
                self.num_all += sum(len(h) for layer in self._computed[span] for h in layer)

    def _of_heads(self, of_live: list[torch.Tensor]) -> list[torch.Tensor]:
        """A page that a head owns may lie in any slot of a block."""
        if self._probe.worker.compression.groups[0].heads is None:
            return of_live
        return [torch.cat(of_live)] * len(of_live)

    def _entries(self, req_id: str, span: tuple[int, int] | None) -> list[list[torch.Tensor]]:
        """By layer and slot of a block, [num_entries, 2 * head_size].

        Args:
            span: Positions that were not compressed yet; None for all live columns.
        """
        found = []
        for group in self._probe.worker.compression.groups:
            columns = self._managers[group.tensors.group_id].req_to_blocks[req_id]
            if span is not None:
                columns = columns[: -(-span[1] // BLOCK_SIZE)]
            blocks = [block.block_id for block in columns if span or not block.is_null]
            for stack in group.tensors.stacks:
                caches = (stack.key_cache[:, blocks], stack.value_cache[:, blocks])
                # [num_layers, num_kv_heads, entries, 2 * head_size].
                entries = torch.cat(caches, dim=-1).transpose(1, 2).flatten(2, 3)
                if span is not None:
                    entries = entries[:, :, slice(*span)]
                found += [list(layer.clone()) for layer in entries]
        return found


class TestProtection:
    """One engine for all of it."""

    def test_protected_tokens_are_in_the_cache_as_they_were_computed(self, fresh):
        watch = Watch(fresh)
        before = group_stats(fresh)
        serve(fresh, both(PROTECT), watch)
        after = group_stats(fresh)
        for group, earlier in zip(after, before, strict=True):
            # Two of LONG at least, and one of SHORT.
            assert group["num_compactions"] >= earlier["num_compactions"] + 3
        assert set(watch.num_missing) == {0}
        assert len(watch.num_missing) > LONG_ANSWER
        assert watch.num_all == sum(stop - start for start, stop in SPANS) * NUM_LAYERS * NUM_HEADS
        # Of SHORT nothing has to be known.
        assert watch.num_remembered == 1

    def test_unprotected_ones_are_not(self, fresh):
        """The control of the test above."""
        watch = Watch(fresh)
        serve(fresh, both(), watch)
        assert watch.num_missing[-1] > 0
        assert watch.num_remembered == 0

    def test_answers_are_those_on_transformers(self, fresh, compression):
        expected = answers_of_transformers(compression, [LONG], 80, PROTECT)
        assert fresh.generate([LONG], 80, PROTECT) == expected
        assert fresh.generate([LONG], 80) != expected

    def test_others_answer_as_if_nothing_was_protected(self, fresh):
        _, alone = answers(fresh)
        _, beside = answers(fresh, extra_args=PROTECT)
        assert beside == alone


@pytest.mark.parametrize("name", ["by head, two levels", "as it comes"])
def test_hits_chunks_and_preemptions_change_no_answer(name):
    with unlike_heads(), engine(SHARED[name], LLAMA, **OPTIONS) as probe:
        cold = answers(probe, extra_args=PROTECT)
        found = disturbed(probe, PROTECT)
        assert {name: found[name] == cold for name in found} == dict.fromkeys(found, True)


def test_many_requests_with_little_workspace_protect_alike():
    """Requests and layers are taken in turns."""
    prompts = [LONG, LONG[::-1], SHORT + LONG, LONG + SHORT]
    found = []
    for mib in (64, 33):
        with engine({**COMPRESSION, "workspace_mib": mib}, LLAMA, **OPTIONS) as probe:
            found.append(probe.generate(prompts, 70, PROTECT))
    assert found[0] == found[1]


def test_the_second_model_runner_protects_alike():
    lengths = (420, 430)
    with engine(COMPRESSION, LLAMA, **OPTIONS) as probe:
        expected = probe.generate([tokens(n, seed=n) for n in lengths], 60, PROTECT)
        unprotected = probe.generate([tokens(n, seed=n) for n in lengths], 60)
    found = found_by_runner_v2(COMPRESSION, lengths, 60, PROTECT)
    assert found["runner"] == "vllm.v1.worker.cpu.model_runner"
    assert found["answers"] == expected != unprotected


@pytest.mark.parametrize(
    "parallel",
    [{"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2}],
    ids=["tensor", "pipeline"],
)
def test_two_workers_protect_alike(parallel: dict[str, Any]):
    with engine(COMPRESSION, LLAMA, **OPTIONS) as probe:
        expected = probe.generate([LONG], 60, PROTECT)
    found = answers_of_workers(LLAMA, COMPRESSION, parallel, [LONG], 60, extra_args=PROTECT)
    assert found.answers == expected


def test_a_worker_that_forgets_what_it_kept_is_noticed(monkeypatch):
    """A planted bug: after the first compaction only positions say what is protected."""
    monkeypatch.setattr(
        "ems_vllm.engine.group.protection.kept_of", lambda mask, idx: torch.zeros_like(idx).bool()
    )
    with engine(COMPRESSION, LLAMA, **OPTIONS) as probe:
        watch = Watch(probe)
        serve(probe, both(PROTECT), watch)
    assert watch.num_missing[-1] > 0


class TestUnchecked:
    """From a frontend that did not refuse it."""

    @pytest.fixture(scope="class", params=[True, False], ids=["off", "no off"])
    def allow_off(self, request):
        return request.param

    @pytest.fixture(scope="class")
    def probe(self, allow_off):
        with engine({**COMPRESSION, "allow_off": allow_off}, LLAMA, **OPTIONS) as probe:
            yield probe

    @pytest.mark.parametrize("value", ["0-100", "0-9000", "system", "nonsense"])
    def test_a_bad_request_keeps_everything_where_that_is_allowed(
        self, probe, allow_off, value, monkeypatch
    ):
        from vllm.v1.engine.input_processor import InputProcessor

        checked = InputProcessor.process_inputs
        monkeypatch.setattr(InputProcessor, "process_inputs", checked.__wrapped__)
        before = probe.stats()["num_compactions"]
        probe.generate([LONG], 40, {"kv_protect": value})
        compactions = probe.stats()["num_compactions"] - before
        assert (compactions == 0) == allow_off


def test_protected_entries_forget_requests_that_ended():
    entries = ProtectedEntries(BLOCK_SIZE, torch.device("cpu"))
    entries._kept["a"] = torch.zeros(1, 1, 16, dtype=torch.bool)
    entries.release(["b"])
    assert len(entries) == 1
    entries.release(["a"])
    assert len(entries) == 0


def test_many_ranges_protect_what_each_of_them_does():
    """Of heads that have kept different numbers of entries before."""
    order = SimpleNamespace(
        req_id="a", first_before=2, tail=9, protected=((0, 40), (50, 51), (60, 70), (130, 900))
    )
    held = np.array([[10, 30, 20]])
    wave = ProtectedEntries(BLOCK_SIZE, torch.device("cpu")).wave([order])
    mask = wave.of_heads(0, held, 120)[0, :, 0]
    for head, num_held in enumerate(held[0]):
        # Entries behind the kept ones are of the positions from 32 + 20 on, up to 144.
        positions = np.arange(120) - num_held + 52
        is_protected = [
            52 <= position < 144
            and any(start <= position < stop for start, stop in order.protected)
            for position in positions
        ]
        assert mask[head].tolist() == is_protected
