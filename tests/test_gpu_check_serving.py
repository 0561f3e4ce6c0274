# SPDX-License-Identifier: Apache-2.0
"""The serving stage of the GPU check: what it compares, and what is left when a part fails."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest
from gpu import limited, serving
from gpu.summary import details_of

ROOT = Path(__file__).resolve().parents[1]
FOUND = {
    "answers": [[1, 2]],
    "compactions": 3,
    "used_at_end": 0,
    "decode": {"late_blocks": 10},
    "tight": {"peak_blocks": 20, "tokens_per_s": 30.0},
}
DENSE = FOUND | {"decode": {"late_blocks": 100}}


ALL = {("dense", False): DENSE, ("ems", False): FOUND, ("heads", False): FOUND}


def try_all(tmp_path, monkeypatch, outcomes, stop=()):
    """Run with made-up outcomes by (configuration, eager): results, or an exit code."""

    def run(command, limit_s):
        name, eager = command[2], "--eager" in command
        if (name, eager) in stop:
            raise KeyboardInterrupt
        outcome = outcomes[name, eager]
        if isinstance(outcome, int):
            return outcome, f"{name} says why"
        Path(command[command.index("--out") + 1]).write_text(json.dumps(outcome))
        return 0, ""

    monkeypatch.setattr(serving, "run_and_repeat", run)
    options = argparse.Namespace(
        out=tmp_path / "serving.json", size="tiny", device="cuda", eager=False, limit=50
    )
    try:
        serving.try_all(options, "model")
    except KeyboardInterrupt:
        assert stop
    return json.loads(options.out.read_text())


def test_all_is_well(tmp_path, monkeypatch):
    report = try_all(tmp_path, monkeypatch, ALL)
    assert (report["complete"], report["tokens_identical"], report["wrong"]) == (True, True, [])
    assert "tokens identical" in details_of("serving", tmp_path)


def test_one_configuration_hangs_and_the_other_is_reported(tmp_path, monkeypatch):
    outcomes = ALL | {("ems", False): limited.TIMED_OUT, ("ems", True): 1}
    report = try_all(tmp_path, monkeypatch, outcomes)
    assert report["runs"]["dense"]["tight"]["tokens_per_s"] == 30
    assert not report["complete"]
    errors = {
        (tried["configuration"], tried["cuda_graphs"]): tried["error"]
        for tried in report["attempts"]
    }
    assert errors == {
        ("dense", True): None,
        ("ems", True): "stopped after 50 s\nems says why",
        ("heads", True): None,
        ("ems", False): "exit 1\nems says why",
    }
    assert len(report["wrong"]) == 2
    assert details_of("serving", tmp_path) == (
        "dense: ran; ems: stopped after 50 s, ems says why; heads: ran; "
        "ems (no CUDA graphs): exit 1, ems says why"
    )


def test_working_only_without_graphs_is_a_failure_with_results(tmp_path, monkeypatch):
    outcomes = ALL | {("ems", False): 1, ("ems", True): FOUND}
    report = try_all(tmp_path, monkeypatch, outcomes)
    assert report["complete"]
    assert report["tokens_identical"]
    with_graphs = {name: run["cuda_graphs"] for name, run in report["runs"].items()}
    assert with_graphs == {"dense": True, "ems": False, "heads": True}
    assert report["wrong"] == ["ems fails with CUDA graphs: exit 1"]


def test_what_was_found_before_an_interruption_is_written(tmp_path, monkeypatch):
    report = try_all(tmp_path, monkeypatch, {("dense", False): DENSE}, stop=[("ems", False)])
    assert report["runs"]["dense"]["decode"]["late_blocks"] == 100
    assert details_of("serving", tmp_path) == "dense: ran; ems: cut off"


def test_other_tokens_are_wrong(tmp_path, monkeypatch):
    other = FOUND | {"answers": [[1, 3]]}
    report = try_all(tmp_path, monkeypatch, ALL | {("ems", False): other})
    assert report["wrong"] == ["within the budget, tokens differ from dense vLLM's"]
    assert "tokens DIFFERENT" in details_of("serving", tmp_path)


def test_by_head_most_first_tokens_have_to_be_those_of_dense_vllm(tmp_path, monkeypatch):
    def wrong(*firsts):
        answers = [[first, 3] for first in firsts]
        outcomes = {
            key: found | {"answers": answers if key[0] == "heads" else [[1, 2], [1, 2], [1, 2]]}
            for key, found in ALL.items()
        }
        return try_all(tmp_path, monkeypatch, outcomes)["wrong"]

    assert wrong(1, 1, 5) == []
    assert wrong(1, 5, 5) == ["by head, most first tokens differ from dense vLLM's"]


def test_by_head_nothing_was_compressed(tmp_path, monkeypatch):
    dense_alike = FOUND | {"compactions": 0, "decode": DENSE["decode"]}
    report = try_all(tmp_path, monkeypatch, ALL | {("heads", False): dense_alike})
    assert report["wrong"] == [
        "by head, no request was compressed",
        "by head, compressed requests hold as many blocks as dense ones",
    ]


def test_last_lines_of_what_hangs_are_kept(capfd, monkeypatch):
    monkeypatch.setattr(limited, "GRACE_S", 1)
    text = "import time\nfor i in range(50): print('line', i, flush=True)\ntime.sleep(600)"
    code, said = serving.run_and_repeat([sys.executable, "-c", text], 3)
    assert code == limited.TIMED_OUT
    assert "line 49" in said
    assert "line 3\n" not in said
    assert "line 3\n" in capfd.readouterr().out


@pytest.mark.slow
def test_serving_compares_dense_and_compressed(tmp_path):
    """The real engine, a tiny model, on this machine's CPU."""
    out = tmp_path / "serving.json"
    command = [sys.executable, "benchmarks/gpu/serving.py", "--out", str(out)]
    options = ["--size", "tiny", "--device", "cpu"]
    done = subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(out.read_text())
    assert report["tokens_identical"]
    assert report["wrong"] == []
    dense = report["runs"]["dense"]
    for name in ("ems", "heads"):
        found = report["runs"][name]
        assert found["compactions"] > 0
        assert found["tight"]["peak_blocks"] <= dense["tight"]["peak_blocks"]
    assert "tokens identical; peak blocks" in details_of("serving", tmp_path)
