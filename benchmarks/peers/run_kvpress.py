# SPDX-License-Identifier: Apache-2.0
"""Answer the prompts of `ems-vllm eval --export-prompts` with NVIDIA kvpress on transformers.

Usage: make peers-run MODEL=folder PROMPTS=prompts.jsonl OUT=folder [PEERS_ARGS="--budgets 0.06"]

Writes one file of answers per press and budget, and all of them as one result, kvpress.json, for
`ems-vllm report`. A run that was interrupted goes on where it stopped. `--self-check` shows
instead that nothing is lost where nothing is dropped. Runs in .venv-peers.
"""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ems_vllm.config.errors import ConfigError
from ems_vllm.eval.records.answer_folder import (
    AnswerFile,
    check_manifest,
    fingerprint,
    missing,
    write_result,
)
from ems_vllm.eval.records.budget import Budget
from ems_vllm.eval.records.method import FULL, methods_of
from ems_vllm.eval.records.prompt_files import read_prompts
from peers import presses
from peers.budgets import WINDOW

if TYPE_CHECKING:
    from peers.model import Model

DEFAULT_BUDGETS = ("0.02", "0.03", "0.06", "0.125", "0.25", "0.5")


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    everything = [FULL, *presses.NAMES]
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", required=True, help="model folder")
    parser.add_argument("--prompts", type=Path, help="JSON lines")
    parser.add_argument("--out", type=Path, help="folder for the answers")
    parser.add_argument(
        "--presses",
        nargs="+",
        choices=everything,
        metavar="PRESS",
        help=f"from {', '.join(everything)}; default all that the model supports",
    )
    parser.add_argument(
        "--budgets",
        nargs="+",
        type=Budget.parse,
        default=[Budget.parse(text) for text in DEFAULT_BUDGETS],
        metavar="BUDGET",
        help="entries per kv_head in all: a fraction of the context length, or a number above 1",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    parser.add_argument("--dtype", default="auto", help="auto (the model's), float32, bfloat16")
    parser.add_argument(
        "--window", type=int, default=WINDOW, help=f"observation window in queries; {WINDOW}"
    )
    parser.add_argument("--seed", type=int, default=0, help="of presses that draw")
    parser.add_argument("--limit", type=int, help="first prompts only")
    parser.add_argument(
        "--teacher-forced",
        action="store_true",
        help="beside each answer, log probabilities of the prompt's gold_token_ids",
    )
    parser.add_argument("--self-check", action="store_true", help="compare with plain transformers")
    arguments = parser.parse_args(argv)
    if not arguments.self_check and (arguments.prompts is None or arguments.out is None):
        parser.error("--prompts and --out are needed")
    return arguments


def run(arguments: argparse.Namespace) -> None:
    prompts = read_prompts(arguments.prompts)[: arguments.limit]

    # Imported here: --help and mistakes must not take the seconds that transformers takes.
    from tqdm import tqdm

    from peers.model import Model

    model = Model(arguments.model, arguments.device, arguments.dtype, arguments.window)
    environment: dict[str, Any] = {
        "engine": presses.ENGINE,
        "model": arguments.model,
        "dtype": model.dtype,
        "obs_window": arguments.window,
        "seed": arguments.seed,
        "teacher_forced": arguments.teacher_forced,
        "versions": {name: version(name) for name in ("kvpress", "transformers", "torch")},
    }
    check_manifest(arguments.out, {**environment, "prompts_sha256": fingerprint(arguments.prompts)})
    paths = {
        method: arguments.out / method.file_name
        for method in methods_of(
            chosen_presses(arguments.presses, model), arguments.budgets, presses.ENGINE
        )
    }
    with ExitStack() as stack:
        files = {method: stack.enter_context(AnswerFile(path)) for method, path in paths.items()}
        todo = missing(prompts, files)
        total = sum(len(item.methods) for item in todo)
        bar = stack.enter_context(tqdm(total=total, unit="answer", smoothing=0.02))
        for item in todo:
            bar.set_postfix_str(f"{item.prompt.task}, {len(item.prompt.prompt_token_ids)} tokens")
            answers_to = model.answers(
                item.prompt, item.methods, arguments.seed, arguments.teacher_forced
            )
            for method, line in answers_to:
                files[method].write(line)
                bar.update()
    result = arguments.out / "kvpress.json"
    answers = {path: method.describe() for method, path in paths.items()}
    hardware = {"device": str(model.model.device), "machine": platform.machine()}
    write_result(result, prompts, answers, arguments.model, {**environment, **hardware})
    for name, seconds in model.seconds.most_common():
        print(f"{seconds:9.2f} s {name}")
    print(f"{len(prompts):,} prompts, {len(answers)} methods: {result}")


def chosen_presses(asked: Sequence[str] | None, model: Model) -> list[str]:
    """The presses that were asked for, or all that the model supports.

    Raises:
        ConfigError: one was asked for that it does not support.
    """
    everything = [FULL, *presses.NAMES]
    refused = [name for name in asked or everything if not model.supports(name)]
    if refused and asked:
        raise ConfigError(
            f"presses={refused[0]!r} is not for models with sliding windows: leave it out."
        )
    if refused:
        print(f"Left out, as they are not for models with sliding windows: {', '.join(refused)}")
    return [name for name in asked or everything if name not in refused]


def self_check(arguments: argparse.Namespace) -> bool:
    from peers.self_check import check

    # In a coarser dtype, sums in another order are another answer.
    dtype = "float32" if arguments.dtype == "auto" else arguments.dtype
    failures = check(arguments.model, arguments.device, dtype)
    for failure in failures:
        print(failure)
    print("Self-check failed." if failures else "Self-check passed: kvpress is ready.")
    return not failures


def main(argv: Sequence[str] | None = None) -> int:
    try:
        arguments = parse_arguments(argv)
        if arguments.self_check:
            return 0 if self_check(arguments) else 1
        run(arguments)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
