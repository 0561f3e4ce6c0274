# SPDX-License-Identifier: Apache-2.0
"""How runs are put together, what they are compared with, and what counts."""

import math

import pytest
from eval.report_results import BITS, BUDGETS, KVPRESS, results

from ems_vllm.eval.records.results import EvalResult, MethodResult, SampleResult
from ems_vllm.eval.report.aggregate import aggregate
from ems_vllm.eval.report.compare import mean_table, task_table


def sample(score, index=0, *, task="t", error=None, length=100):
    return SampleResult(
        task=task, length=length, seed=0, index=index, score=score, error=error, output=""
    )


def method(name, scores, budget=None, fraction=None, task="t", **fields):
    samples = [sample(score, i, task=task) for i, score in enumerate(scores)]
    return MethodResult(
        method=name, budget=budget, budget_fraction=fraction, samples=samples, **fields
    )


def run(*methods, model="m", **fields):
    return EvalResult(model=model, created="now", methods=list(methods), **fields)


def labels(report):
    return [series.label for series in report.series]


def test_rows_are_named_by_method_and_engine():
    report = aggregate([results({"ems": 2.0}), results({"ems": 2.0}, "transformers")])
    names = ["full (vllm)", "full (transformers)", "ems (vllm)", "ems (transformers)"]
    assert labels(report) == names
    assert report.columns == list(BUDGETS)


def test_the_run_is_named_where_methods_would_be_confused():
    commits = [
        run(method("ems", [1], fraction=0.1), environment={"commit": commit * 8})
        for commit in ("ab12", "cd34")
    ]
    assert labels(aggregate(commits)) == ["ems (vllm, ab12ab12a)", "ems (vllm, cd34cd34c)"]


def test_files_that_each_hold_a_part_are_one_method():
    parts = [
        run(method("snapkv", [1, 0], fraction=0.1)),
        run(method("snapkv", [1, 1], fraction=0.2)),
        run(method("snapkv", [0.5], fraction=0.2, task="other")),
    ]
    report = aggregate(parts)
    assert labels(report) == ["snapkv (vllm)"]
    assert report.series[0].points[0.2].scores.keys() == {"t", "other"}


def test_ablations_are_told_apart_by_the_settings_that_differ():
    report = aggregate(
        [
            run(
                *(
                    method("ems", [1], fraction=b, settings={"merge": merge, "window": 8})
                    for b in (0.1, 0.2)
                    for merge in (True, False)
                )
            )
        ]
    )
    assert labels(report) == ["ems (vllm, merge=True)", "ems (vllm, merge=False)"]
    assert [len(series.points) for series in report.series] == [2, 2]


def test_budgets_that_differ_by_rounding_share_a_column():
    report = aggregate([run(method("a", [1], fraction=0.0625), method("b", [1], fraction=0.0627))])
    assert report.columns == [0.0625]


def test_close_budgets_of_one_method_stay_apart():
    report = aggregate([run(method("a", [1], fraction=0.5), method("a", [1], 51, fraction=0.51))])
    assert report.columns == [0.5, 0.51]


def test_a_budget_in_entries_is_a_share_of_the_longest_context():
    report = aggregate([run(method("a", [1], budget=25), method("b", [], budget=25))])
    assert report.columns == [0.25]
    assert report.skipped == ["b (vllm): budget 25, no context length"]


def test_the_full_cache_of_the_own_engine_is_the_measure():
    report = aggregate(
        [
            run(method("full", [1, 1]), method("ems", [1, 0], fraction=0.1), model="x/m"),
            run(method("full", [1, 0], engine="kvpress"), model="m"),
            run(method("knorm", [1, 0], fraction=0.1, engine="kvpress"), model=""),
            run(method("ems", [1, 0], fraction=0.1), model="other"),
        ]
    )
    kept = {
        row.series.label: row.cells[0.1].interval.value
        for row in mean_table(report).rows
        if 0.1 in row.cells
    }
    # The last run's model has no full cache: it cannot be placed.
    assert kept == {"ems (vllm, run 1)": 0.5, "knorm (kvpress)": 1.0}


def test_a_task_that_the_full_cache_fails_counts_in_no_mean():
    report = aggregate([results()])
    excluded = {task.name: task.excluded for task in report.tasks if task.excluded}
    assert excluded.keys() == {"vt", BITS}
    assert excluded["vt"].startswith("the full cache itself scores 0.")
    assert all(
        cell.num_tasks == 4 for row in mean_table(report).rows for cell in row.cells.values()
    )


def test_errors_are_wrong_answers_but_never_good_ones():
    full = run(
        method("full", [1, 1]),
        method("full", [2.0, 2.0], task="bits"),
        MethodResult(
            method="ems",
            budget_fraction=0.1,
            samples=[
                sample(1),
                sample(0, 1, error="timeout"),
                sample(2.5, task="bits"),
                sample(0, 1, task="bits", error="timeout"),
                sample(math.inf, 2, task="bits"),
            ],
        ),
        higher_is_better={"bits": False},
    )
    report = aggregate([full])
    [ems] = report.compressed
    assert ems.points[0.1].num_errors == 2
    tables = {task.name: task_table(report, task) for task in report.tasks}
    assert tables["t"].cell(ems, 0.1).interval.value == 0.5
    assert tables["bits"].cell(ems, 0.1).interval.value == pytest.approx(0.5)


def test_best_and_tied_follow_the_pairs():
    base = [1.0, 0.0] * 50
    near = [*base[:-1], 1.0]
    report = aggregate(
        [
            run(
                method("full", [1.0] * 100),
                method("near", base, fraction=0.1),
                method("ems", near, fraction=0.1),
                method("far", [0.0] * 60 + base[60:], fraction=0.1),
            )
        ]
    )
    cells = {row.series.method: row.cells.get(0.1) for row in mean_table(report).rows}
    assert cells["ems"].is_best
    assert cells["near"].is_tied
    assert not cells["far"].is_tied
    assert cells["far"].behind.value == pytest.approx(0.31)


def test_less_is_better_turns_the_ranking_round():
    report = aggregate([results()])
    table = task_table(report, next(task for task in report.tasks if task.name == BITS))
    assert table.is_difference
    cells = {series.method: cell for series, cell in table.column(0.02)}
    assert cells["ems"].is_best
    assert cells["random"].behind.excludes(0)
    assert cells["random"].interval.value > cells["ems"].interval.value > 0


def test_a_method_that_skipped_tasks_is_never_the_best():
    easy = [sample(1, i, task="easy") for i in range(5)]
    both = easy + [sample(0, i, task="hard") for i in range(5)]
    full = easy + [sample(1, i, task="hard") for i in range(5)]
    report = aggregate(
        [
            run(
                MethodResult(method="full", samples=full),
                MethodResult(method="lazy", budget_fraction=0.1, samples=easy),
                MethodResult(method="a", budget_fraction=0.1, samples=both),
                MethodResult(method="b", budget_fraction=0.1, samples=both),
            )
        ]
    )
    cells = {series.method: cell for series, cell in mean_table(report).column(0.1)}
    assert cells["lazy"].interval.value == 1
    assert not cells["lazy"].complete
    assert not cells["lazy"].is_best
    assert cells["a"].is_best


def test_peers_names_have_the_colour_of_ours():
    report = aggregate([results({"snapkv": 1.0, "knorm": 0.0}), results(KVPRESS, "kvpress")])
    families = {series.method: series.family for series in report.compressed}
    assert families["SnapKVPress"] == families["snapkv"]
    assert families["TOVAPress"] == "tova"
