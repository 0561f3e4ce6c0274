# SPDX-License-Identifier: Apache-2.0
"""Budgets of other libraries' methods, counted like ours; kvpress itself where it is installed."""

import os
import subprocess
from unittest import mock

import pytest
from engine.harness import LLAMA, ROOT
from peers import presses
from peers.budgets import WINDOW, compression_ratio, pyramid_beta, window_size
from peers.methods import Method, methods
from peers.run_kvpress import main, parse_arguments

from ems_vllm.eval.budget import Budget

PEERS_PYTHON = ROOT / ".venv-peers" / "bin" / "python"


@pytest.mark.parametrize("prompt_len", [2, 17, 100, 1000, 3999, 4096, 8191, 131_072])
def test_kvpress_keeps_as_many_entries_as_asked_for(prompt_len):
    """Its two ways from a ratio to a number: truncated in most presses, rounded in PyramidKV."""
    for entries in {1, 2, 15, 16, 17, prompt_len // 50, prompt_len // 3, prompt_len - 1}:
        if 1 <= entries < prompt_len:
            kept = prompt_len * (1 - compression_ratio(entries, prompt_len))
            assert int(kept) == round(kept) == entries
    assert compression_ratio(None, prompt_len) == 0


def test_window_leaves_room_for_a_choice():
    assert window_size(100, 4000) == WINDOW
    assert window_size(20, 4000) == 10
    assert window_size(1, 4000) == 1
    # kvpress asks for a window shorter than the prompt.
    assert window_size(None, 9) == 4
    assert window_size(None, 2) == 1


def test_pyramid_is_no_steeper_than_kvpress_carries_out():
    for entries in (1, 20, 82, 164, 1000):
        assert entries / pyramid_beta(entries, 4000) >= window_size(entries, 4000)
    assert pyramid_beta(1000, 4000) == 20


def test_every_method_has_a_file_of_its_own():
    budgets = [Budget.parse(text) for text in ("0.02", "2e-2", "0.5", "64", "full")]
    chosen = methods([presses.FULL, *presses.NAMES], budgets)
    assert len(chosen) == 1 + 3 * len(presses.NAMES)
    assert len({method.file_name for method in chosen}) == len(chosen)
    assert chosen[0].file_name == "kvpress-full.jsonl"
    assert chosen[1].file_name == f"kvpress-{presses.NAMES[0]}-0.02.jsonl"


def test_budget_is_that_of_the_nominal_length():
    method = Method("snapkv", Budget.parse("0.02"))
    assert [method.entries(4096, prompt_len) for prompt_len in (4000, 82, 81)] == [81, 81, None]
    assert Method(presses.FULL, Budget()).entries(4096, 4000) is None
    described = method.describe()
    assert (described.engine, described.budget, described.budget_fraction) == (
        "kvpress",
        None,
        0.02,
    )


def test_every_name_builds_a_press():
    kvpress = mock.MagicMock()
    with mock.patch.dict("sys.modules", kvpress=kvpress):
        options = presses.PressOptions.of(64, 1000, seed=5)
        for name in presses.NAMES:
            presses.build(name, options)
        assert set(presses._factories()) == set(presses.NAMES)
    kvpress.RandomPress.assert_called_with(options.ratio, seed=5)


def test_command_line(capsys):
    arguments = parse_arguments(["--model", "m", "--prompts", "p", "--out", "o"])
    assert len(methods(arguments.presses, arguments.budgets)) == 1 + 6 * len(presses.NAMES)
    with pytest.raises(SystemExit):
        parse_arguments(["--model", "m"])
    assert main(["--model", "m", "--prompts", "none.jsonl", "--out", "o"]) == 2
    assert "prompts='none.jsonl' cannot be read" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(not PEERS_PYTHON.exists(), reason="kvpress is not installed: `make peers`")
def test_without_compression_every_press_answers_like_transformers():
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'benchmarks'}"}
    command = [PEERS_PYTHON, "-m", "peers.run_kvpress", "--model", LLAMA, "--self-check"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
