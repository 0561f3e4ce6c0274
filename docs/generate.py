# SPDX-License-Identifier: Apache-2.0
"""Writes the reference pages that are tables of the code, and in other pages the tables of measured
figures: `python docs/generate.py`.

tests/test_docs.py fails when a page is not what this script would write.
"""

from __future__ import annotations

import json
from pathlib import Path

import tables

from ems_vllm.config import load_config, recipes
from ems_vllm.config.protect import KEY, NOTHING, ROLES
from ems_vllm.config.schema import KVCompressionConfig
from ems_vllm.engine.frontend.compatibility import HARMONY_ROLES, RULES
from ems_vllm.engine.refusal import Refusal
from ems_vllm.engine.worker.refusals import LAYER_REFUSALS
from ems_vllm.patches.catalogue import PATCHES
from ems_vllm.patches.contracts import CONTRACTS
from ems_vllm.policies.base import ALLOCATORS, MERGERS, SCORERS, SELECTORS

DOCS = Path(__file__).resolve().parent
_NOTE = "<!-- Written by docs/generate.py; change the code it reads, not this page. -->\n"


def compatibility() -> str:
    lines = [
        "# What cannot be combined with compression",
        "",
        "Each of these is refused at start-up with one sentence; nothing is ever served silently "
        "uncompressed.",
        "",
        "| setting | why | instead |",
        "|---|---|---|",
    ]
    lines += [_row(rule) for rule in (*RULES, HARMONY_ROLES)]
    lines += [
        "",
        "And, once the model is loaded, from its layers and their attention backend:",
        "",
        "| setting | why | instead |",
        "|---|---|---|",
    ]
    lines += [_row(refusal) for refusal in LAYER_REFUSALS]
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
        "own a KV cache. Sliding windows and states of Mamba or linear attention are bounded "
        "already and stay as they are.",
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
        "([settings](configuration.md#per-request)). A `VllmConfig` that holds the settings but "
        "was not made by `EngineArgs` is refused when its engine starts. "
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


def _row(refusal: Refusal) -> str:
    # Braces name what only the running engine knows.
    cells = (f"`{refusal.key}`", refusal.reason, refusal.remedy)
    return f"| {' | '.join(cells)} |".replace("{", "").replace("}", "")


_APPLIED = {True: "also where compression is off", False: "only where compression is on"}


def patches() -> str:
    lines = [
        "# Patches of vLLM",
        "",
        "Everything else goes through vLLM's extension points. A patch wraps one function, checks "
        "the version and the source it was written for, and raises when either differs or another "
        "extension has wrapped the function, also through functools.wraps. On such a vLLM "
        "everything runs as without this package, and compression is refused with what to do.",
        "",
    ]
    for patch in PATCHES:
        lines += [
            f"## `{patch.target}`",
            "",
            f"* vLLM: `{patch.vllm}`; tested source: {', '.join(patch.source_sha256)}",
            f"* Process: {patch.process}; {_APPLIED[patch.always]}",
            f"* Why: {patch.reason}",
            f"* Upstream: {patch.upstream}",
            f"* Goes when: {patch.remove_when}",
            "",
        ]
    lines += [
        "## Relied upon",
        "",
        "These are not wrapped, but compression is only right as long as they do what they did "
        "when they were read. Their sources are compared when compression is switched on; where "
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


def configuration() -> str:
    described = _attributes(KVCompressionConfig.__doc__ or "")
    lines = [
        "# Settings",
        "",
        "`--kv-compression NAME` (or a YAML file) picks a recipe; `--kv-compression-config` "
        "overrides its settings with JSON or a YAML file. From Python: "
        '`LLM(model, additional_config={"kv_compression": {"recipe": "ems", "budget": 1024}})`. '
        "Every default is ours.",
        "",
        "| setting | default | meaning |",
        "|---|---|---|",
    ]
    for name, field in KVCompressionConfig.model_fields.items():
        # One default depends on other settings; shown is what a recipe without more gets.
        value = getattr(load_config("ems"), name) if field.default_factory else field.default
        default = "set by the recipe" if field.is_required() else f"`{value}`"
        lines.append(f"| `{name}` | {default} | {described[name]} |")
    lines += ["", f"Recipes: {', '.join(f'`{name}`' for name in recipes.names())}.", ""]
    for registry in (SCORERS, ALLOCATORS, SELECTORS, MERGERS):
        lines += [f"## {registry.kind}", ""]
        for name in registry:
            cls = registry.get(name)
            summary = (cls.__doc__ or "").strip().splitlines()[0]
            options = ", ".join(
                f"`{option}` ({'required' if field.is_required() else field.default})"
                for option, field in cls.model_fields.items()
            )
            lines.append(f"* `{name}`: {summary}" + (f" Options: {options}." if options else ""))
        lines.append("")
    lines += [
        "## Per request",
        "",
        'Through `vllm_xargs` of the OpenAI API (`extra_body={"vllm_xargs": {...}}`): '
        "`kv_compression` (`on` or `off`), and one of `kv_budget` (entries) and `kv_ratio` "
        "(fraction of the prompt), at most the server's size or, where that is more, its "
        "`max_budget`. Anything else is an HTTP 400, and so is a misspelt key; keys that vLLM and "
        "other extensions read are left alone.",
        "",
        f"`{KEY}` names tokens of the prompt that stay whole ([what must not be dropped]"
        "(budgets.md#what-must-not-be-dropped)): a list, or one text with commas, of half-open "
        "ranges of positions (`0-128`: the first 128 tokens), and in chat completions of roles "
        f"({', '.join(f'`{role}`' for role in ROLES)}). It replaces the server's `protect`; "
        f"`{NOTHING}` protects nothing.",
        "",
        "A change of any setting makes vLLM compile the model once more on the next start, because "
        "its compilation cache is keyed by all of `additional_config`. vLLM has no way to leave a "
        "setting out of that key; later starts with the same settings find the model compiled.",
        "",
        "## Environment",
        "",
        "* `EMS_CPU_PLATFORM`: `0` never offers the CPU platform to vLLM, `1` always does; unset, "
        "it is offered where torch has no accelerator build.",
        "* `EMS_CPU_VARIANT`: `avx512_bf16`, `avx512`, `avx2` or `portable` forces the instruction "
        "set of the CPU kernels; unset, the best one that the processor has.",
        "* `VLLM_PLUGINS`: vLLM's list of plugins to load; where it is set, it must name "
        "`ems_vllm`.",
        "",
    ]
    return "\n".join(lines)


def _attributes(docstring: str) -> dict[str, str]:
    """Descriptions of the `Attributes:` section, by name."""
    found: dict[str, str] = {}
    names: list[str] = []
    for line in docstring.split("Attributes:")[1].splitlines():
        text = line.strip()
        head, colon, rest = text.partition(": ")
        if colon and all(part.isidentifier() for part in head.split(", ")):
            names = head.split(", ")
            text = rest
        for name in names if text else ():
            found[name] = f"{found.get(name, '')} {text}".strip()
    return found


PAGES = {
    "compatibility.md": compatibility,
    "configuration.md": configuration,
    "patches.md": patches,
}


def main() -> None:
    for name, write in PAGES.items():
        (DOCS / name).write_text(_NOTE + write(), encoding="utf-8")
    for path in sorted(DOCS.glob("*.md")):
        page = path.read_text(encoding="utf-8")
        path.write_text(tables.fill(page), encoding="utf-8")


if __name__ == "__main__":
    main()
