# SPDX-License-Identifier: Apache-2.0
"""Writes the reference pages that are tables of the code, and in other pages the tables of measured
figures: `python docs/generate.py`.

tests/test_docs.py fails when a page is not what this script would write.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path

import tables
from pages import api, cli, configuration, life
from tables import measured

from ems_vllm.engine.frontend.compatibility import HARMONY_ROLES, RULES
from ems_vllm.engine.refusal import Refusal
from ems_vllm.engine.worker.refusals import LAYER_REFUSALS
from ems_vllm.methods.measured import described
from ems_vllm.patches.catalogue import PATCHES
from ems_vllm.patches.contracts import CONTRACTS

DOCS = Path(__file__).resolve().parent
MEASURED = DOCS.parent / "configs" / "measured"
_NOTE = "<!-- Written by docs/generate.py; change the code it reads, not this page. -->\n"


def compatibility() -> str:
    lines = [
        "# What cannot be combined with compression",
        "",
        "Each of these is refused at start-up with one sentence; nothing is ever served silently "
        "uncompressed.",
        "In `<...>` stands what the running engine fills in.",
        "",
        "| setting | why | instead |",
        "|---|---|---|",
    ]
    lines += _rows((*RULES, HARMONY_ROLES))
    lines += [
        "",
        "And, once the model is loaded, from its layers and their attention backend:",
        "",
        "| setting | why | instead |",
        "|---|---|---|",
    ]
    lines += _rows(LAYER_REFUSALS)
    lines += [
        "",
        "A model in which image tokens see each other (Gemma 3 and 4 with images) needs "
        "`--attention-backend TRITON_ATTN` on Hopper and Blackwell: there vLLM prefers "
        "`TRITON_FLASH_ATTN` or `TRITON_FLASHINFER`, which send each batch to one of two backends "
        "and cannot be observed.",
        "",
        "## Well-known models",
        "",
        "What the checks above decide for public configurations in bfloat16, of the layers that "
        "own a KV cache.",
        "Sliding windows and states of Mamba or linear attention are bounded already and stay as "
        "they are.",
        "",
        "| model | on a GPU | on the CPU |",
        "|---|---|---|",
    ]
    lines += _model_rows()
    lines += [
        "",
        "A window longer than any request (Phi-3 128k, Phi-4-mini) is full attention in effect: "
        "`--hf-overrides '{\"sliding_window\": null}'` says so to vLLM, and every layer is "
        "compressed.",
        "",
        "A request with a wrong `vllm_xargs`, with more than the server keeps, with beam search, "
        "or with a prompt that is still being streamed is an HTTP 400 "
        "([settings](configuration.md#per-request)).",
        "A `VllmConfig` that holds the settings but was not made by `EngineArgs` is refused when "
        "its engine starts.",
        "What is known to work, and by which test, is in [reliability.md](reliability.md).",
    ]
    return "\n".join(lines) + "\n"


def _model_rows() -> list[str]:
    """Written by tests/engine/known_models.py, whose test keeps the outcomes in step."""
    found = json.loads((DOCS / "models.json").read_text(encoding="utf-8"))
    rows = []
    for name, by_device in found.items():
        on_gpu, on_cpu = (_outcome(by_device[device]) for device in ("cuda", "cpu"))
        rows.append(f"| {name} | {on_gpu} | {'the same' if on_cpu == on_gpu else on_cpu} |")
    return rows


def _outcome(by_recipe: dict[str, str]) -> str:
    with_queries, without = by_recipe["ems"], by_recipe["knorm"]
    if with_queries == without:
        return with_queries
    return f"{with_queries}; with a recipe that reads no queries (knorm): {without}"


def _rows(refusals: Iterable[Refusal]) -> list[str]:
    """A row for each reason; settings that are refused for the same share one."""
    keys: dict[tuple[str, str], list[str]] = {}
    for refusal in refusals:
        keys.setdefault((refusal.reason, refusal.remedy), []).append(f"`{refusal.key}`")
    return [
        f"| {', '.join(settings)} | {_filled(reason)} | {_filled(remedy)} |"
        for (reason, remedy), settings in keys.items()
    ]


# What the names in braces stand for, which only the running engine knows.
_DETAILS = {
    "choice": "backend",
    "dtype": "dtype",
    "heads": "numbers",
    "known": "backends",
    "layers": "what each layer has",
    "name": "layer",
    "native": "block size",
    "reason": "details",
    "scales": "scales",
}


def _filled(text: str) -> str:
    """A text with placeholders, as `<block size>`, for what is in braces."""
    return re.sub(r"{(\w+)}", lambda found: f"`<{_DETAILS[found[1]]}>`", text)


_APPLIED = {True: "also where compression is off", False: "only where compression is on"}


def _linked(upstream: str) -> str:
    """Numbers of vLLM's issues and pull requests as links; an issue's leads to either."""
    return re.sub(r"#(\d+)", r"[#\1](https://github.com/vllm-project/vllm/issues/\1)", upstream)


def patches() -> str:
    lines = [
        "# Patches of vLLM",
        "",
        "Everything else goes through vLLM's extension points.",
        "A patch wraps one function, checks the version and the source it was written for, and "
        "raises when either differs or another extension has wrapped the function, also through "
        "functools.wraps.",
        "On such a vLLM everything runs as without this package, and compression is refused with "
        "what to do.",
        "",
    ]
    for patch in PATCHES:
        lines += [
            f"## `{patch.target}`",
            "",
            f"* vLLM: `{patch.vllm}`; tested source: {', '.join(patch.source_sha256)}",
            f"* Process: {patch.process}; {_APPLIED[patch.always]}",
            f"* Why: {patch.reason}",
            f"* Upstream: {_linked(patch.upstream)}",
            f"* Goes when: {patch.remove_when}",
            "",
        ]
    lines += [
        "## Relied upon",
        "",
        "These are not wrapped, but compression is only right as long as they do what they did "
        "when they were read.",
        "Their sources are compared when compression is switched on; where "
        "one differs, or another extension has wrapped it, compression is refused and vLLM alone "
        "runs as ever.",
        "",
        "| function | what compression relies on | read in |",
        "|---|---|---|",
    ]
    lines += [
        f"| `{contract.target}` | {contract.why} | {', '.join(contract.source_sha256)} |"
        for contract in CONTRACTS
    ]
    return "\n".join(lines) + "\n"


PAGES = {
    "api.md": api.page,
    "cli.md": cli.page,
    "compatibility.md": compatibility,
    "configuration.md": configuration.page,
    "life-of-a-request.md": life.page,
    "patches.md": patches,
}


def main() -> None:
    for name, text in measured.files().items():
        (MEASURED / name).write_text(text, encoding="utf-8")
    described.cache_clear()
    for name, write in PAGES.items():
        (DOCS / name).write_text(_NOTE + write(), encoding="utf-8")
    for path in (DOCS.parent / "README.md", *sorted(DOCS.glob("*.md"))):
        page = path.read_text(encoding="utf-8")
        path.write_text(tables.fill(page), encoding="utf-8")


if __name__ == "__main__":
    main()
