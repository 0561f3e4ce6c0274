# SPDX-License-Identifier: Apache-2.0
"""Budgets of other libraries' methods, counted like ours; kvpress itself where it is installed."""

import os
import random
import subprocess
from unittest import mock

import pytest
from engine.harness import LLAMA, ROOT
from peers import presses
from peers.budgets import WINDOW, chunks, compression_ratio, entries_kept, pyramid_beta, window_size
from peers.run_kvpress import chosen_presses, main, parse_arguments

from ems_vllm.config.errors import ConfigError
from ems_vllm.eval.records.budget import Budget
from ems_vllm.eval.records.method import FULL, Method, methods_of
from ems_vllm.eval.records.prompt_files import AnswerLine, PromptLine, read

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


@pytest.mark.parametrize("prompt_len", [40, 333, 1000, 4000])
def test_chunkkv_keeps_whole_chunks_within_the_budget(prompt_len):
    for entries in {4, 24, 39, prompt_len // 3, prompt_len - 1} - {prompt_len}:
        length, ratio = chunks(entries, prompt_len)
        complete, rest = divmod(prompt_len, length)
        num_kept = int((complete + (rest > 0)) * (1 - ratio))
        # The incomplete chunk at the end is among them: it has the window.
        kept = num_kept * length - ((length - rest) if rest else 0)
        assert entries - length < kept <= entries
    assert chunks(None, prompt_len) == (20, 0.0)


def test_kvzip_drops_exactly_what_is_asked_of_all_layers_together():
    for num_rows in (16, 90, 2560):
        for entries, prompt_len in ((24, 40), (81, 4000), (1000, 131_072)):
            ratio = compression_ratio(entries, prompt_len, -1e-6)
            assert int(num_rows * prompt_len * ratio) == num_rows * (prompt_len - entries)


def test_every_method_has_a_file_of_its_own():
    budgets = [Budget.parse(text) for text in ("0.02", "2e-2", "0.5", "64", "full")]
    chosen = methods_of([FULL, *presses.NAMES], budgets, presses.ENGINE)
    assert len(chosen) == 1 + 3 * len(presses.NAMES)
    assert len({method.file_name for method in chosen}) == len(chosen)
    assert chosen[0].file_name == "kvpress-full.jsonl"
    assert chosen[1].file_name == f"kvpress-{presses.NAMES[0]}-0.02.jsonl"


def test_budget_is_that_of_the_nominal_length():
    method = Method("snapkv", presses.ENGINE, Budget.parse("0.02"))
    total = method.budget.total(4096)
    assert [entries_kept(total, prompt_len) for prompt_len in (4000, 82, 81)] == [81, 81, None]
    assert entries_kept(Method(FULL, presses.ENGINE).budget.total(4096), 4000) is None
    described = method.describe()
    assert (described.engine, described.budget, described.budget_fraction) == (
        "kvpress",
        None,
        0.02,
    )


def test_every_name_builds_a_press():
    kvpress = mock.MagicMock()
    ours = {f"peers.{name}": mock.MagicMock() for name in ("cam", "pyramid", "scorers")}
    with mock.patch.dict("sys.modules", kvpress=kvpress, **ours):
        options = presses.PressOptions(64, 1000, seed=5)
        for name in presses.NAMES:
            presses.build(name, options)
        assert set(presses._factories()) == set(presses.NAMES)
    kvpress.RandomPress.assert_called_with(options.ratio, seed=5)
    assert set(presses.NAMES) > presses.WITHOUT_SLIDING_WINDOWS


def test_command_line(capsys):
    arguments = parse_arguments(["--model", "m", "--prompts", "p", "--out", "o"])
    assert not arguments.teacher_forced
    model = mock.Mock()
    model.supports.return_value = True
    chosen = chosen_presses(arguments.presses, model)
    assert len(methods_of(chosen, arguments.budgets, presses.ENGINE)) == 1 + 6 * len(presses.NAMES)
    with pytest.raises(SystemExit):
        parse_arguments(["--model", "m"])
    assert main(["--model", "m", "--prompts", "none.jsonl", "--out", "o"]) == 2
    assert "prompts='none.jsonl' cannot be read" in capsys.readouterr().err


def test_presses_that_a_model_does_not_support_are_left_out_or_refused(capsys):
    model = mock.Mock()
    model.supports = lambda name: name not in presses.WITHOUT_SLIDING_WINDOWS
    chosen = chosen_presses(None, model)
    assert set(presses.NAMES) - set(chosen) == presses.WITHOUT_SLIDING_WINDOWS
    assert "finch, kvzip" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="presses='kvzip'"):
        chosen_presses(["snapkv", "kvzip"], model)


@pytest.mark.slow
@pytest.mark.skipif(not PEERS_PYTHON.exists(), reason="kvpress is not installed: `make peers`")
def test_without_compression_every_press_answers_like_transformers():
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'benchmarks'}"}
    command = [PEERS_PYTHON, "-m", "peers.run_kvpress", "--model", LLAMA, "--self-check"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.skipif(not PEERS_PYTHON.exists(), reason="kvpress is not installed: `make peers`")
def test_answers_to_a_question_that_comes_later(tmp_path):
    """With nothing dropped, reading a question later is reading it at once, in all figures."""
    generator = random.Random(0)
    context, question, gold = ([generator.randrange(900) for _ in range(n)] for n in (90, 9, 5))
    common = {"task": "niah", "length": 128, "seed": 0, "depth": None, "prompt": ""}
    common |= {"max_tokens": 6, "stop": (), "references": ("x",), "gold_token_ids": gold}
    prompts = [
        PromptLine(**common, index=0, prompt_token_ids=context + question),
        PromptLine(
            **common,
            index=0,
            protocol="later",
            prompt_token_ids=context,
            written_token_ids=question,
        ),
        PromptLine(
            **common | {"task": "bits_per_byte"},
            index=0,
            protocol="later",
            prompt_token_ids=context,
            written_token_ids=question,
            continuation_token_ids=gold,
            continuation_bytes=9,
        ),
    ]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(prompt.model_dump_json() + "\n" for prompt in prompts))
    command = [PEERS_PYTHON, "-m", "peers.run_kvpress", "--model", LLAMA, "--prompts", path]
    command += ["--out", tmp_path / "out", "--dtype", "float32", "--teacher-forced"]
    command += ["--presses", "full", "adakv_snapkv", "snapkv", "--budgets", "24", "100"]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'benchmarks'}"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr

    def answers(name: str) -> tuple[AnswerLine, AnswerLine, AnswerLine]:
        lines = list(read(tmp_path / "out" / f"kvpress-{name}.jsonl", AnswerLine, "answers"))
        found = {(line.task, line.protocol): line for line in lines}
        keys = (("niah", "last"), ("niah", "later"), ("bits_per_byte", "later"))
        return tuple(found[key] for key in keys)

    full, later, continued = answers("full")
    assert full.output == later.output
    assert len(full.gold_logprobs) == len(gold)
    assert later.gold_logprobs == pytest.approx(full.gold_logprobs, abs=1e-3)
    assert continued.logprobs == pytest.approx(full.gold_logprobs, abs=1e-3)
    for name in ("snapkv-100", "adakv_snapkv-100"):
        assert answers(name)[1].gold_logprobs == pytest.approx(later.gold_logprobs, abs=1e-3)
    for name in ("snapkv-24", "adakv_snapkv-24"):
        compressed = answers(name)
        assert compressed[1].gold_logprobs != pytest.approx(later.gold_logprobs, abs=1e-3)
        assert compressed[2].logprobs == pytest.approx(compressed[1].gold_logprobs, abs=1e-3)
