# SPDX-License-Identifier: Apache-2.0
"""A test of the test: the simulator notices each of these bugs."""

import pytest
from engine.busy_run import SETTINGS, busy_runs
from engine.levels import COVERED, WITHIN_PROMPTS

from ems_vllm.engine.pools import Pool
from ems_vllm.engine.report import StepReport
from ems_vllm.engine.scheduler.accounts import Accounts
from ems_vllm.engine.scheduler.compaction_ledger import CompactionLedger
from ems_vllm.engine.scheduler.dealer import Dealer
from ems_vllm.engine.scheduler.kv_cache_manager import CompressedAttentionManager
from ems_vllm.engine.scheduler.planner import Planner
from ems_vllm.engine.scheduler.request import SchedulerRequest
from ems_vllm.engine.worker.kept_columns import KeptColumns
from ems_vllm.engine.worker.requests import StepRefused, WorkerRequests


def _freed_one_step_early(monkeypatch):
    # The obvious rule: what the plan says for the tokens processed so far. The step that compacts
    # has not run then, it is just being scheduled.
    monkeypatch.setattr(
        CompactionLedger, "columns_to_free", lambda self, processed: self.plan.columns(processed)[0]
    )


def _hit_ends_a_block_too_late(monkeypatch):
    admit = Planner.admit

    def admit_more(self, request):
        limit = admit(self, request)
        return None if limit is None else limit + 4

    monkeypatch.setattr(Planner, "admit", admit_more)
    _compressed_columns_are_hashed(monkeypatch)


def _compressed_columns_are_hashed(monkeypatch):
    monkeypatch.setattr(
        CompressedAttentionManager,
        "cache_blocks",
        super(CompressedAttentionManager, CompressedAttentionManager).cache_blocks,
    )


def _worker_state_survives_a_preemption(monkeypatch):
    begin_step = WorkerRequests.begin_step

    def forgetful(self, orders):
        orders.ended.clear()
        orders.admitted[:] = [r for r in orders.admitted if r not in self._requests]
        return begin_step(self, orders)

    monkeypatch.setattr(WorkerRequests, "begin_step", forgetful)


def _chunk_runs_across_a_compaction(monkeypatch):
    limit_chunk = Planner.limit_chunk
    monkeypatch.setattr(
        Planner,
        "limit_chunk",
        lambda self, request, start, wanted: limit_chunk(self, request, start, wanted) and wanted,
    )


def _message_edited(monkeypatch, edit):
    """Lets `edit` change, or replace, the orders of every step."""
    orders = Planner.orders
    monkeypatch.setattr(
        Planner, "orders", lambda self, output: edit(self, output, orders(self, output))
    )


def _scores_of_an_earlier_owner_are_added_to(monkeypatch):
    def edit(planner, output, orders):
        starts = dict(zip(output.num_scheduled_tokens, orders.starts, strict=True))
        orders.scored[:] = [
            chunk._replace(num_accumulated=starts[chunk.req_id]) for chunk in orders.scored
        ]
        return orders

    _message_edited(monkeypatch, edit)


def _preempted_request_hits_its_own_prompt(monkeypatch):
    admit = Planner.admit

    def forgetful(self, request):
        if request.request_id in self.requests:
            self.requests[request.request_id].first_hit = None
        return admit(self, request)

    monkeypatch.setattr(Planner, "admit", forgetful)


def _preempted_request_scores_more_than_at_first(monkeypatch):
    first_scored_query = SchedulerRequest.first_scored_query

    def of_this_hit(self, num_processed):
        first_hit, self.first_hit = self.first_hit, None
        found = first_scored_query(self, num_processed)
        self.first_hit = first_hit
        return found

    monkeypatch.setattr(SchedulerRequest, "first_scored_query", of_this_hit)


def _chunks_look_like_decoding(monkeypatch):
    monkeypatch.setattr(Planner, "_unlike_decoding", lambda self, remaining, wanted: wanted)


def _private_score_pages_are_shared(monkeypatch):
    def deal_none(self, tracked):
        tracked.score_pages = [[] for _ in tracked.ledgers]
        return True

    monkeypatch.setattr(Dealer, "deal_pages", deal_none)


def _row_is_dealt_twice(monkeypatch):
    take = Pool.take

    def take_and_keep(self, count):
        items = take(self, count)
        # Rows are numbered from 0 on, pages behind the blocks.
        if items and items[0] < SETTINGS["query_ring_rows"]:
            self._free.append(items[0])
        return items

    monkeypatch.setattr(Pool, "take", take_and_keep)


def _message_is_dropped(monkeypatch):
    _message_edited(
        monkeypatch, lambda planner, output, orders: None if orders.step == 30 else orders
    )


def _message_is_for_another_step(monkeypatch):
    kept = {}

    def edit(planner, output, orders):
        kept[planner, orders.step] = orders
        return kept[planner, 29] if orders.step == 30 else orders

    _message_edited(monkeypatch, edit)


def _compaction_is_lost(monkeypatch):
    def edit(planner, output, orders):
        if orders.step > 20:
            orders.compactions.clear()
        return orders

    _message_edited(monkeypatch, edit)


def _worker_compacts_twice(monkeypatch):
    def edit(planner, output, orders):
        orders.compactions.extend(orders.compactions[:1])
        return orders

    _message_edited(monkeypatch, edit)


def _freed_by_the_first_column_of_another_group(monkeypatch):
    def remove_skipped_blocks(self, request_id, processed, num_prompt_tokens=None):
        tracked = self._requests.get(request_id)
        if tracked is not None:
            other = tracked.ledgers[self._index - 1]
            self._remove_blocks_in_range(request_id, 0, other.columns_to_free(processed))

    monkeypatch.setattr(CompressedAttentionManager, "remove_skipped_blocks", remove_skipped_blocks)


def _groups_are_dealt_the_same_score_pages(monkeypatch):
    init = Dealer.__init__

    def init_alike(self, specs, num_blocks, max_num_seqs):
        init(self, specs, num_blocks, max_num_seqs)
        self.pages = [Pool(num_blocks, spec.num_score_pages) for spec in specs]

    monkeypatch.setattr(Dealer, "__init__", init_alike)


def _longest_shared(tracked):
    """What may be shared of a request if the group that keeps least decides."""
    limits = [ledger.plan.max_shared_tokens for ledger in tracked.ledgers]
    return max((limit for limit in limits if limit is not None), default=None)


def _hit_is_limited_by_the_group_that_keeps_least(monkeypatch):
    admit = Planner.admit

    def admit_more(self, request):
        admit(self, request)
        return _longest_shared(self.requests[request.request_id])

    monkeypatch.setattr(Planner, "admit", admit_more)


def _columns_are_hashed_up_to_the_group_that_keeps_least(monkeypatch):
    cache_blocks = CompressedAttentionManager.cache_blocks

    def cache_more(self, request, *args, **kwargs):
        tracked = self._requests[request.request_id]
        limit, tracked.max_shared_tokens = tracked.max_shared_tokens, _longest_shared(tracked)
        cache_blocks(self, request, *args, **kwargs)
        tracked.max_shared_tokens = limit

    monkeypatch.setattr(CompressedAttentionManager, "cache_blocks", cache_more)


def _queries_score_for_the_group_that_keeps_least(monkeypatch):
    def first_scored_query(self, num_processed):
        plans = [ledger.plan for ledger in self.ledgers]
        return max(plan.first_scored_query(num_processed) for plan in plans)

    monkeypatch.setattr(SchedulerRequest, "first_scored_query", first_scored_query)


def _late_group_represents_the_generated_tokens_only(monkeypatch):
    restart = CompactionLedger.restart

    def restart_scored(self):
        restart(self)
        self.accumulated_until = self.plan.prompt_len

    monkeypatch.setattr(CompactionLedger, "restart", restart_scored)


def _prompt_does_not_wait_for_its_blocks(monkeypatch):
    monkeypatch.setattr(SchedulerRequest, "waits_for_blocks", lambda self, start: False)


def _what_was_kept_of_a_prompt_is_scored_by_its_old_columns(monkeypatch):
    def edit(planner, output, orders):
        orders.scored[:] = [chunk._replace(first_column=0) for chunk in orders.scored]
        return orders

    _message_edited(monkeypatch, edit)


def _scores_of_what_was_kept_are_lost(monkeypatch):
    def edit(planner, output, orders):
        orders.scored[:] = [
            chunk._replace(num_accumulated=0) if chunk.first_column else chunk
            for chunk in orders.scored
        ]
        return orders

    _message_edited(monkeypatch, edit)


def _queries_score_twice(monkeypatch):
    first_scored_query = SchedulerRequest.first_scored_query
    # Those before the prompt's end, whatever is compacted before.
    monkeypatch.setattr(
        SchedulerRequest,
        "first_scored_query",
        lambda self, num_processed: first_scored_query(self, self.prompt_len - 1),
    )


def _account_survives_a_preemption(monkeypatch):
    released = Accounts.released

    def released_at_its_end(self, req_id, has_ended):
        if has_ended:
            released(self, req_id, has_ended)

    monkeypatch.setattr(Accounts, "released", released_at_its_end)


def _compaction_is_booked_when_it_is_planned(monkeypatch):
    orders = Planner.orders

    def booked(self, output):
        found = orders(self, output)
        firsts = [order.first for order in found.compactions]
        self.accounts.compacted(found.step, found.compactions, firsts)
        return found

    monkeypatch.setattr(Planner, "orders", booked)


def _news_is_lost_where_there_is_no_output(monkeypatch):
    tell = Accounts.tell

    def told(self, outputs):
        tell(self, outputs)
        self._news.clear()

    monkeypatch.setattr(Accounts, "tell", told)


def _report_is_ignored(monkeypatch):
    monkeypatch.setattr(Planner, "processed", lambda self, orders, report: None)


def _report_edited(monkeypatch, edit):
    """Lets `edit` change the columns of every report."""
    processed = Planner.processed

    def edited(self, orders, report):
        if report is not None:
            report = StepReport(edit(list(report.first_columns)))
        return processed(self, orders, report)

    monkeypatch.setattr(Planner, "processed", edited)


def _report_is_of_another_request(monkeypatch):
    _report_edited(monkeypatch, lambda firsts: firsts[::-1])


def _one_column_too_many_is_freed(monkeypatch):
    _report_edited(monkeypatch, lambda firsts: [first + 1 for first in firsts])


def _report_is_of_a_step_before(monkeypatch):
    kept = []

    def edit(firsts):
        kept.append(firsts)
        return next((one for one in kept[:-1] if len(one) == len(firsts)), firsts)

    _report_edited(monkeypatch, edit)


def _replay_decides_anew(monkeypatch):
    def edit(planner, output, orders):
        orders.compactions[:] = [order._replace(num_kept=0) for order in orders.compactions]
        return orders

    _message_edited(monkeypatch, edit)


def _decisions_survive_a_preemption(monkeypatch):
    monkeypatch.setattr(KeptColumns, "release", lambda self, req_ids: None)


def _prompt_scores_columns_as_planned(monkeypatch):
    monkeypatch.setattr(KeptColumns, "_chunk", lambda self, chunk: chunk)


def _attention_begins_as_planned(monkeypatch):
    keep = KeptColumns.keep

    def keep_planned(self, kept_from):
        return keep(self, {key: max(0, first - 1) for key, first in kept_from.items()})

    monkeypatch.setattr(KeptColumns, "keep", keep_planned)


PLANTS = [
    _freed_one_step_early,
    _hit_ends_a_block_too_late,
    _compressed_columns_are_hashed,
    _worker_state_survives_a_preemption,
    _chunk_runs_across_a_compaction,
    _scores_of_an_earlier_owner_are_added_to,
    _preempted_request_hits_its_own_prompt,
    _preempted_request_scores_more_than_at_first,
    _chunks_look_like_decoding,
    _private_score_pages_are_shared,
    _row_is_dealt_twice,
    _message_is_dropped,
    _message_is_for_another_step,
    _compaction_is_lost,
    _worker_compacts_twice,
    _account_survives_a_preemption,
    _compaction_is_booked_when_it_is_planned,
    _news_is_lost_where_there_is_no_output,
]
# These need levels that keep differently.
PLANTS_OF_LEVELS = [
    _freed_by_the_first_column_of_another_group,
    _groups_are_dealt_the_same_score_pages,
    _hit_is_limited_by_the_group_that_keeps_least,
    _columns_are_hashed_up_to_the_group_that_keeps_least,
    _queries_score_for_the_group_that_keeps_least,
    _late_group_represents_the_generated_tokens_only,
]
# These need prompts that are compacted as they come.
PLANTS_WITHIN_PROMPTS = [
    _prompt_does_not_wait_for_its_blocks,
    _what_was_kept_of_a_prompt_is_scored_by_its_old_columns,
    _scores_of_what_was_kept_are_lost,
    _queries_score_twice,
]
# These need workers that keep less than is planned.
PLANTS_OF_COVERAGE = [
    _report_is_ignored,
    _report_is_of_another_request,
    _one_column_too_many_is_freed,
    _report_is_of_a_step_before,
    _replay_decides_anew,
    _decisions_survive_a_preemption,
    _attention_begins_as_planned,
]


@pytest.mark.parametrize("levels", ["alike", "one whole"])
@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.__name__.strip("_"))
def test_planted_bug_is_caught(plant, levels, monkeypatch):
    plant(monkeypatch)
    with pytest.raises((AssertionError, StepRefused)):
        busy_runs(levels)


@pytest.mark.parametrize("levels", ["pyramid of 2", "one whole"])
@pytest.mark.parametrize("plant", PLANTS_OF_LEVELS, ids=lambda plant: plant.__name__.strip("_"))
def test_bug_planted_between_groups_is_caught(plant, levels, monkeypatch):
    plant(monkeypatch)
    with pytest.raises((AssertionError, StepRefused)):
        busy_runs(levels)


@pytest.mark.parametrize("levels", WITHIN_PROMPTS)
@pytest.mark.parametrize(
    "plant", PLANTS_WITHIN_PROMPTS, ids=lambda plant: plant.__name__.strip("_")
)
def test_bug_planted_within_prompts_is_caught(plant, levels, monkeypatch):
    plant(monkeypatch)
    with pytest.raises((AssertionError, StepRefused)):
        busy_runs(levels)


@pytest.mark.parametrize("levels", COVERED)
@pytest.mark.parametrize("plant", PLANTS_OF_COVERAGE, ids=lambda plant: plant.__name__.strip("_"))
def test_bug_planted_in_what_is_reported_is_caught(plant, levels, monkeypatch):
    plant(monkeypatch)
    with pytest.raises((AssertionError, StepRefused)):
        busy_runs(levels)


def test_bug_planted_in_the_scores_of_what_is_kept_is_caught(monkeypatch):
    _prompt_scores_columns_as_planned(monkeypatch)
    with pytest.raises((AssertionError, StepRefused)):
        busy_runs("covered within prompts")
