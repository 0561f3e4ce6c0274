# SPDX-License-Identifier: Apache-2.0
"""The page of the HTTP API: what a request may send, what answers say, and how wrong ones fail."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from tables.markdown import table

from ems_vllm.config import ConfigError, RequestOptions, load_config
from ems_vllm.config.protect import KEY, NOTHING, ROLES
from ems_vllm.config.request import KEYS
from ems_vllm.engine.frontend.holdings import ATTRIBUTE
from ems_vllm.engine.frontend.usage import Usage

# What each key of `vllm_xargs` takes, and what it means.
_FIELDS = {
    "kv_compression": (
        '`"on"` or `"off"`',
        "`off`: this request keeps its whole cache, unless the server has `allow_off: false`. "
        "`on`: it is compressed also where the server does so [only under pressure](pressure.md). "
        "The method is the server's.",
    ),
    "kv_budget": (
        "whole number, at least 1",
        "Entries kept per kv_head, at most the server's `budget` or, where that is more, its "
        "`max_budget`.",
    ),
    "kv_ratio": (
        "number in (0, 1)",
        "Instead of `kv_budget`: entries kept as a fraction of the prompt. On a server with a "
        "`budget` they are at most that.",
    ),
    KEY: (
        "list of texts, or one text with commas",
        "Tokens of the prompt that stay whole: half-open ranges (`0-128`) and, in chat "
        f"completions, roles ({', '.join(f'`{role}`' for role in ROLES)}); `{NOTHING}` protects "
        "nothing. [Details](protection.md).",
    ),
}
# Wrong wishes, of which a server with the recipe `ems` as it ships says what is below.
_WRONG: tuple[Mapping[str, Any], ...] = (
    {"kv_bugdet": 64},
    {"kv_compression": "h2o"},
    {"kv_budget": 0},
    {"kv_budget": 4096},
    {"kv_ratio": 1.5},
    {"kv_budget": 64, "kv_ratio": 0.1},
    {"kv_compression": "off", "kv_budget": 64},
    {"kv_protect": ["assistant"]},
    {"kv_protect": ["128-0"]},
)


def page() -> str:
    assert tuple(_FIELDS) == KEYS
    own = {one.name for one in fields(RequestOptions)} - {"is_asked_for"}
    assert own == {"enabled", "budget", "ratio", "protect"}
    wishes = [[f"`{key}`", *row] for key, row in _FIELDS.items()]
    usage = ", ".join(f"`{key}`" for key in Usage("ems").as_dict())
    refused = [f"    {_refusal(wrong)}" for wrong in _WRONG]
    return "\n".join(
        [
            *_BEGIN,
            table(["`vllm_xargs.`", "value", "meaning"], wishes),
            *_REQUEST,
            f"`usage.{ATTRIBUTE}` of an answer has {usage}: [what each means, where it is not, and "
            "how streams have it](verify.md).",
            "",
            "`/metrics` has the metrics `ems_vllm:*` beside vLLM's own ([list](verify.md)).",
            "",
            *_ERRORS,
            *refused,
            *_END,
        ]
    )


def _refusal(wrong: Mapping[str, Any]) -> str:
    """The sentence that a server says of a request."""
    config = load_config("ems")
    assert config is not None
    try:
        RequestOptions.parse(wrong).check_ceiling(config.plan_settings)
    except ConfigError as error:
        return str(error)
    raise AssertionError(f"{wrong} is allowed")


_BEGIN = [
    "# HTTP API",
    "",
    "The server is vLLM's own, with its endpoints and fields.",
    "Three things are added: fields of a request's `vllm_xargs`, `kv_compression` in the `usage` "
    "of answers, and metrics.",
    "",
    "## Request",
    "",
    "`vllm_xargs` is vLLM's field for what extensions read; it goes with completions, chat "
    "completions and the Responses API.",
    "A request that sends none is compressed as the server's recipe says.",
    "",
]

_REQUEST = [
    "",
    "    curl http://localhost:8000/v1/completions -H 'Content-Type: application/json' -d '{",
    '      "model": "MODEL", "prompt": "...", "vllm_xargs": {"kv_budget": 256}}\'',
    "",
    "With the `openai` client it is a part of `extra_body`:",
    "",
    "```python",
    "client.chat.completions.create(",
    '    model=..., messages=..., extra_body={"vllm_xargs": {"kv_protect": ["system"]}}',
    ")",
    "```",
    "",
    "From Python it is `SamplingParams(extra_args={...})`, with the same keys.",
    "Keys that vLLM and other extensions read are left alone.",
    "What the server decides, and no request can change, is in its [settings](configuration.md).",
    "",
    "## Answer",
    "",
]

_ERRORS = [
    "## Errors",
    "",
    "What a request may not have is an HTTP 400 in the OpenAI format, before anything is computed: "
    "`error.message` is one sentence with the key, the value and the remedy, `error.param` is "
    "`vllm_xargs`.",
    "The server goes on.",
    "",
    '    {"error": {"message": "vllm_xargs.kv_bugdet=64 is not a setting: use \'kv_budget\'. '
    '(parameter=vllm_xargs)",',
    '     "type": "BadRequestError", "param": "vllm_xargs", "code": 400}}',
    "",
    "With the recipe `ems` as it ships, for example:",
    "",
]

_END = [
    "",
    "What is protected and has no room, or is not in the prompt, is refused as well "
    "([protection](protection.md)); so are beam search and prompts that are still being streamed, "
    "unless the request says `kv_compression: off` ([what cannot be combined](compatibility.md)).",
    "Other sentences, and what to do, are in [troubleshooting](troubleshooting.md).",
    "",
]
