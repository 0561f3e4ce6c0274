# SPDX-License-Identifier: Apache-2.0
"""bench_ops.py: what it compares with does the same work, and what it writes can be read."""

import csv
import json
from types import SimpleNamespace

import bench_ops
import pytest
import torch
from opbench import baselines, cases, verify
from opbench.shapes import Model, Shape

from ems_vllm import ops

# Shares of an attention call that scoring may take.
TARGETS = {"all queries, 1 in 16": 0.2, "all queries, 1 in 4": 0.2, "all queries": 0.6, "256": 0.02}
MODEL = Model("test", 2, 4, 2, 64)


def shape(**changes):
    arguments = {"length": 80, "num_rows": 2, "budget": 16, "dtype": torch.float32}
    return Shape(MODEL, **{**arguments, "device": torch.device("cpu"), **changes})


def copy(args):
    return tuple(arg.clone() if isinstance(arg, torch.Tensor) else arg for arg in args)


@pytest.mark.parametrize("length", [80, 600])
def test_baselines_compute_what_the_operators_do(length):
    torch.manual_seed(0)
    for op, args in verify.arguments(shape(length=length)):
        if op == "score_queries" and args[10] > 1:
            continue  # PyTorch's line is for all queries
        ours, theirs = copy(args), copy(args)
        getattr(ops, op)(*ours)
        getattr(baselines, op)(*theirs)
        verify.compare(op, ours, theirs)


def test_a_wrong_operator_is_not_timed():
    verify.check(shape())
    bodies = {name: operator.reference for name, operator in ops.OPERATORS.items()}
    bodies["record_queries"] = lambda query, slots, ring: ring.zero_()
    with (
        ops.implemented_by(SimpleNamespace(**bodies)),
        pytest.raises(AssertionError, match="record_queries"),
    ):
        verify.check(shape())


def test_every_operator_is_timed():
    timed = " ".join(case.op for case in cases.of_shape(shape()))
    assert not [op for op in ops.OPERATORS if op not in timed]


def test_report(tmp_path, capsys):
    files = tmp_path / "ops.json", tmp_path / "ops.csv"
    arguments = ["--device", "cpu", "--models", "small", "--lengths", "64", "--dtypes", "float32"]
    arguments += ["--seconds", "0", "--json", str(files[0]), "--csv", str(files[1])]
    bench_ops.main(arguments)
    report = json.loads(files[0].read_text())
    assert report["build"]["version"]
    assert report["ceilings"]["float32"]["copy_bytes_per_s"] > 0
    lines = report["lines"]
    with files[1].open() as file:
        assert [line["op"] for line in csv.DictReader(file)] == [line["op"] for line in lines]
    attention = min(line["p50_ms"] for line in lines if line["op"] == "attention")
    for line in lines:
        assert line["p20_ms"] <= line["p50_ms"] <= line["p80_ms"]
        if line["op"] == "score_queries":
            share = next(share for key, share in TARGETS.items() if key in line["variant"])
            assert line["target_ms"] == pytest.approx(share * attention)
            assert line["of_target"] == pytest.approx(line["target_ms"] / line["p50_ms"])
    assert "of ceiling" in capsys.readouterr().out
