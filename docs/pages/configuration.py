# SPDX-License-Identifier: Apache-2.0
"""The page of settings: defaults, what each recipe makes of them, and the parts of a policy."""

from __future__ import annotations

import json
from typing import Any

import yaml
from tables.markdown import table

from ems_vllm.config import load_config, recipes
from ems_vllm.config.protect import KEY, NOTHING, ROLES
from ems_vllm.config.schema import KVCompressionConfig
from ems_vllm.policies.base import ALLOCATORS, MERGERS, SCORERS, SELECTORS, Component
from ems_vllm.policies.model_profile import LayerProfile

_PARTS = ("scorer", "allocator", "selector", "merger")

# tests/test_docs.py loads it as a server would.
EXAMPLE = """\
# SnapKV's choice, but merged; requests may ask for more, none may switch compression off.
budget: 2048
max_budget: 4096
allow_off: false
recompress_interval: 512
scorer: {name: snapkv, kernel_size: 7}
allocator: {name: uniform}
selector: {name: top_k, num_sink_tokens: 4}
merger: {name: ems}
"""


def page() -> str:
    lines = [
        "# Settings",
        "",
        "`--kv-compression NAME` (or a YAML file) picks a recipe.",
        "`--kv-compression-config` overrides its settings with JSON or a YAML file.",
        'From Python: `LLM(model, additional_config={"kv_compression": {"recipe": "ems", "budget": '
        "1024}})`.",
        "Every default is ours.",
        "",
        _settings(),
        "",
        "`ems-vllm show RECIPE` prints all settings of a recipe.",
        "",
        "## Recipes",
        "",
        "What each of them sets; an option is named where it is not the default of its part, "
        "below.",
        "",
        _recipes(),
        "",
        "## A recipe of your own",
        "",
        "A file like this one, with any setting of the first table; what is left out is its "
        "default:",
        "",
        *("    " + line for line in EXAMPLE.splitlines()),
        "",
        "    vllm serve MODEL --kv-compression recipe.yaml",
        "",
    ]
    for registry in (SCORERS, ALLOCATORS, SELECTORS, MERGERS):
        lines += [f"## {registry.kind}", ""]
        lines += [_part(name, registry.get(name)) for name in registry]
        lines.append("")
    return "\n".join(lines + _REST)


def _settings() -> str:
    """Every setting, with the default that a server has with the recipes that ship."""
    described = _attributes(KVCompressionConfig.__doc__ or "")
    rows = []
    for name in KVCompressionConfig.model_fields:
        meaning = described[name].replace("None", "`null`")
        rows.append([f"`{name}`", _default(name), meaning])
    return table(["setting", "default", "meaning"], rows)


def _default(setting: str) -> str:
    if setting == "recipe":
        return "its name"
    values = {_yaml(getattr(_config(recipe), setting)) for recipe in recipes.names()}
    return f"`{values.pop()}`" if len(values) == 1 else "the recipe's"


def _recipes() -> str:
    rows = []
    for name in recipes.names():
        config = _config(name)
        size = f"budget {config.budget}" if config.budget is not None else f"ratio {config.ratio}"
        parts = (f"`{_yaml(getattr(config, part))}`" for part in _PARTS)
        rows.append([f"`{name}`", size, *parts])
    return table(["recipe", "size", *_PARTS], rows)


def _part(name: str, cls: type[Component]) -> str:
    summary = (cls.__doc__ or "").strip().splitlines()[0]
    options = ", ".join(
        f"`{option}` ({'required' if field.is_required() else _yaml(field.default)})"
        for option, field in cls.model_fields.items()
    )
    return f"* `{name}`: {summary}" + (f"\n  Options: {options}." if options else "")


def _config(recipe: str) -> KVCompressionConfig:
    config = load_config(recipe)
    assert config is not None
    return config


def _yaml(value: Any) -> str:
    """A value as a recipe has it, in one line."""
    if isinstance(value, Component):
        options = (
            f"{name}: {_yaml(getattr(value, name))}"
            for name, field in type(value).model_fields.items()
            if field.is_required() or getattr(value, name) != field.default
        )
        return ", ".join((value.name(), *options))
    if isinstance(value, LayerProfile):
        return "-".join(filter(None, (value.model, value.by)))
    return json.dumps(yaml.safe_load(json.dumps(value))).strip('"')


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


_REST = [
    "## Per request",
    "",
    'Through `vllm_xargs` of the OpenAI API (`extra_body={"vllm_xargs": {...}}`):',
    "",
    "* `kv_compression`: `off`, or `on`, which a server that compresses [only under "
    "pressure](pressure.md) obeys in any case.",
    "* Either `kv_budget` (entries) or `kv_ratio` (a fraction of the prompt): at most the server's "
    "size or, where that is more, its `max_budget`.",
    f"* `{KEY}`: tokens of the prompt that stay whole ([protection](protection.md)), as a list or "
    "one text with commas.",
    "  Half-open ranges of positions (`0-128`: the first 128 tokens) and, in chat completions, "
    f"roles ({', '.join(f'`{role}`' for role in ROLES)}).",
    f"  It replaces the server's `protect`; `{NOTHING}` protects nothing.",
    "",
    "Anything else is an HTTP 400, and so is a misspelt key; keys that vLLM and other extensions "
    "read are left alone.",
    "",
    "A change of any setting makes vLLM compile the model once more on the next start, because "
    "its compilation cache is keyed by all of `additional_config`.",
    "vLLM has no way to leave a setting out of that key; later starts with the same settings find "
    "the model compiled.",
    "",
    "## Environment",
    "",
    "* `EMS_CPU_PLATFORM`: `0` never offers the CPU platform to vLLM, `1` always does; unset, it "
    "is offered where torch has no accelerator build.",
    "* `EMS_CPU_VARIANT`: `amx`, `avx512_bf16`, `avx512`, `avx2` or `portable` forces the "
    "instruction set of the CPU kernels; unset, the best one that the processor has.",
    "* `VLLM_PLUGINS`: vLLM's list of plugins to load; where it is set, it must name `ems_vllm`.",
    "",
]
