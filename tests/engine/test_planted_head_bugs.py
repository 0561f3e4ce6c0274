# SPDX-License-Identifier: Apache-2.0
"""A test of the test: the simulator notices each of these bugs of kv_heads that own pages."""

import numpy as np
import pytest
from engine.busy_run import busy_runs

from ems_vllm import ops
from ems_vllm.engine.attention.head_batch import HeadBatch
from ems_vllm.engine.group import compactor
from ems_vllm.engine.group.compactor import Compactor
from ems_vllm.engine.group.head_tables import HeadTables
from ems_vllm.engine.pools import Pool
from ems_vllm.engine.scheduler.planner import Planner


def _release_is_forgotten(monkeypatch, when_finished):
    """Of requests that finish, or of those that are preempted."""
    forgotten = set()
    released, release = Planner.released, HeadTables.release

    def remember(self, request):
        if request.is_finished() == when_finished:
            forgotten.add(request.request_id)
        released(self, request)

    def forget(self, req_ids):
        release(self, [req_id for req_id in req_ids if req_id not in forgotten])

    monkeypatch.setattr(Planner, "released", remember)
    monkeypatch.setattr(HeadTables, "release", forget)


def _place_of_a_preempted_request_is_stale(monkeypatch):
    _release_is_forgotten(monkeypatch, when_finished=False)


def _place_of_a_finished_request_is_lost(monkeypatch):
    _release_is_forgotten(monkeypatch, when_finished=True)


def _place_is_dealt_twice(monkeypatch):
    init = HeadTables.__init__

    class Generous(Pool):
        def take(self, count):
            items = super().take(count)
            self._free.extend(items or ())
            return items

    def init_generous(self, num_layers, num_heads, max_num_seqs, device, shares=None):
        init(self, num_layers, num_heads, max_num_seqs, device, shares)
        self._free = Generous(1, max_num_seqs)

    monkeypatch.setattr(HeadTables, "__init__", init_generous)


def _owned_before_the_compaction_reads(monkeypatch):
    compact_heads = Compactor._compact_heads

    def own_first(self, wave, heads):
        heads.own([order.req_id for order in wave], heads.deal(wave))
        compact_heads(self, wave, heads)

    monkeypatch.setattr(Compactor, "_compact_heads", own_first)


def _owned_is_not_told_to_the_device(monkeypatch):
    own = HeadTables.own

    def own_on_the_host(self, req_ids, pages):
        starts = self.page_starts.clone()
        own(self, req_ids, pages)
        self.page_starts.copy_(starts)

    monkeypatch.setattr(HeadTables, "own", own_on_the_host)


def _compaction_reads_the_tail_a_column_late(monkeypatch):
    by_head = compactor.by_head

    def late(rows, held, block_size):
        found = by_head(rows, held, block_size)
        for row, own in enumerate(held.flatten().tolist()):
            found.block_table[row, own:-1] = found.block_table[row, own + 1 :].copy()
        return found

    monkeypatch.setattr(compactor, "by_head", late)


def _attention_reads_the_tail_a_column_late(monkeypatch):
    head_pages = ops.head_pages

    def late(table, lens, places, page_starts, block_size, out_table, out_lens):
        head_pages(table, lens, places, page_starts, block_size, out_table, out_lens)
        owned = page_starts[places.long()].diff().flatten()
        for row, own in enumerate(owned.tolist()):
            if own:
                out_table[row, own:-1] = out_table[row, own + 1 :].clone()

    monkeypatch.setattr(ops, "head_pages", late)


def _kept_runs_are_laid_out_by_equal_shares(monkeypatch):
    dealt = compactor.dealt

    def equal(heads, rows, kept, block_size):
        found = dealt(heads, rows, kept, block_size)
        num_heads, start = kept.shape[1], heads.block_table.shape[1]
        for row, of_row in enumerate(kept):
            columns = rows.block_table[row, rows.target_columns[row] :]
            for head, count in enumerate(of_row):
                own = (head * (of_row.sum() // num_heads) + np.arange(count)) % of_row.sum()
                pages = columns[own // num_heads] * num_heads + own % num_heads
                found.block_table[row * num_heads + head, start : start + count] = pages
        return found

    monkeypatch.setattr(compactor, "dealt", equal)


def _read_edited(monkeypatch, edit):
    """Lets `edit` change what heads own before a compaction, as its rows see it."""
    by_head = compactor.by_head
    monkeypatch.setattr(
        compactor, "by_head", lambda rows, held, block_size: by_head(rows, edit(held), block_size)
    )


def _compaction_reads_by_equal_shares(monkeypatch):
    def equal(held):
        return np.repeat(held.sum(1, keepdims=True) // held.shape[1], held.shape[1], 1)

    _read_edited(monkeypatch, equal)


def _requests_of_a_wave_are_mixed_up(monkeypatch):
    _read_edited(monkeypatch, lambda held: held[::-1])


def _compaction_of_another_layer(monkeypatch):
    deal = HeadTables.deal
    monkeypatch.setattr(HeadTables, "deal", lambda self, *args: deal(self, *args)[::-1])


def _attention_by_the_pages_of_another_layer(monkeypatch):
    write = HeadBatch.write
    monkeypatch.setattr(HeadBatch, "write", lambda self, layer: write(self, max(0, layer - 1)))


def _places_are_in_the_order_of_the_scheduler(monkeypatch):
    split = HeadBatch.split
    monkeypatch.setattr(
        HeadBatch, "split", lambda self, metadata, req_ids: split(self, metadata, req_ids[::-1])
    )


def _longest_head_is_thought_as_long_as_all(monkeypatch):
    monkeypatch.setattr(HeadTables, "most_beyond", lambda self, places: np.zeros(len(places), int))


def _prompt_blocks_grow_with_the_answer(monkeypatch):
    compaction = Planner._compaction

    def grown(self, *args):
        order = compaction(self, *args)
        return order._replace(prompt_blocks=order.num_computed // 4)

    monkeypatch.setattr(Planner, "_compaction", grown)


def _everybody_is_dealt_alike(monkeypatch):
    monkeypatch.setattr(
        HeadTables,
        "deal",
        lambda self, orders, *args: np.array(
            [[(o.tail - o.first,) * self.num_heads for o in orders] for _ in self._shares]
        ),
    )


def _scores_stay_in_the_slots_of_columns(monkeypatch):
    by_head = compactor.by_head

    def stay(rows, held, block_size):
        found = by_head(rows, held, block_size)
        unowned = by_head(rows, held * 0, block_size)
        width = min(found.score_table.shape[1], unowned.score_table.shape[1])
        found.score_table[:, :width] = unowned.score_table[:, :width]
        return found

    monkeypatch.setattr(compactor, "by_head", stay)


PLANTS = [
    _place_of_a_preempted_request_is_stale,
    _place_of_a_finished_request_is_lost,
    _place_is_dealt_twice,
    _owned_before_the_compaction_reads,
    _owned_is_not_told_to_the_device,
    _compaction_reads_the_tail_a_column_late,
    _attention_reads_the_tail_a_column_late,
    _kept_runs_are_laid_out_by_equal_shares,
    _compaction_reads_by_equal_shares,
    _requests_of_a_wave_are_mixed_up,
    _compaction_of_another_layer,
    _attention_by_the_pages_of_another_layer,
    _places_are_in_the_order_of_the_scheduler,
    _longest_head_is_thought_as_long_as_all,
    _prompt_blocks_grow_with_the_answer,
    _everybody_is_dealt_alike,
    _scores_stay_in_the_slots_of_columns,
]


@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.__name__.strip("_"))
def test_planted_bug_is_caught(plant, monkeypatch):
    # Every other one where layers are in levels, too: all are caught with and without.
    levels = ("heads", "heads in two levels")[PLANTS.index(plant) % 2]
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        busy_runs(levels)
