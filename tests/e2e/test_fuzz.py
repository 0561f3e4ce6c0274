# SPDX-License-Identifier: Apache-2.0
"""Whatever a client puts into `vllm_xargs`: an answer or a 400, and an engine that lives on."""

import difflib
import json
from typing import Any

import httpx
import pytest
from e2e.clients import complete, prompt, wait_until_idle
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ems_vllm.eval.server.process import Server

# Of the `server` fixture.
BUDGET = 128
ALIKE = 0.75
OURS = ("kv_compression", "kv_budget", "kv_ratio")
# Just long enough to be compressed to the smallest budgets.
PROMPT = prompt(160, seed=50)
CHAT = [{"role": "user", "content": "Hello"}]

keys = st.sampled_from(
    [*OURS, *OURS, "kv_bugdet", "kv_", "kv_\n", "KV_BUDGET", "kv", "session_id", "a", ""]
) | st.text(max_size=6)
numbers = (
    st.integers(-2, BUDGET + 2)
    | st.sampled_from([10**30, -(2**63), 10**400, 0.02, 0.5, 1.0, 64.0, 1e-320])
    | st.floats(allow_nan=True, allow_infinity=True)
)
strings = st.sampled_from(["on", "off", "ON", "64", "NaN", "inf", "", "\n", "é"]) | st.text(
    max_size=6
)
values = st.recursive(
    st.none() | st.booleans() | numbers | strings,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=2),
    max_leaves=5,
)
# Settings that are near enough to right that many are served.
plausible = st.fixed_dictionaries(
    {},
    optional={
        "kv_compression": st.sampled_from(["on", "off", "On"]),
        "kv_budget": st.integers(0, BUDGET + 1),
        "kv_ratio": st.floats(0, 1),
        "mine": strings,
    },
)


def is_vllms_own_mistake(xargs: Any) -> bool:
    """Whether vLLM refuses these itself: it takes scalars of 64 bits, and lists of them."""
    if not isinstance(xargs, dict):
        return xargs is not None
    lists = (value if isinstance(value, list) else [value] for value in xargs.values())
    return not all(is_scalar(item) for items in lists for item in items)


def is_scalar(value: Any) -> bool:
    if isinstance(value, int):
        return -(2**63) <= value < 2**64
    return isinstance(value, float | str)


def is_misspelt(key: str) -> bool:
    folded = key.lower().replace("-", "_")
    return bool(difflib.get_close_matches(folded, OURS, cutoff=ALIKE)) and len(key) <= 28


def culprit(xargs: dict[str, Any]) -> tuple[str, ...]:
    """Keys of which the refusal must name one; none where the request is to be served."""
    # vLLM makes numbers of booleans before anything else sees them.
    xargs = {k: int(v) if isinstance(v, bool) else v for k, v in xargs.items()}
    # Other keys are other extensions', or vLLM's own.
    wrong = [key for key in xargs if key not in OURS and is_misspelt(key)]
    mode, budget, ratio = (xargs.get(key) for key in OURS)
    if mode not in (None, "on", "off"):
        wrong.append("kv_compression")
    if budget is not None and not (isinstance(budget, int) and 1 <= budget <= BUDGET):
        wrong.append("kv_budget")
    if ratio is not None and not (isinstance(ratio, int | float) and 0 < ratio < 1):
        wrong.append("kv_ratio")
    sizes = [key for key in ("kv_budget", "kv_ratio") if key in xargs]
    if len(sizes) + (mode == "off") > 1:
        wrong += sizes
    return tuple(wrong)


def ask(server: Server, is_chat: bool, is_streamed: bool, xargs: Any) -> httpx.Response:
    body = {"model": server.model, "max_tokens": 2, "stream": is_streamed, "vllm_xargs": xargs}
    path = "/v1/chat/completions" if is_chat else "/v1/completions"
    body |= {"messages": CHAT} if is_chat else {"prompt": PROMPT}
    # JSON as Python writes it, NaN and halves of characters included.
    headers = {"Content-Type": "application/json"}
    return httpx.post(server.url + path, content=json.dumps(body), headers=headers, timeout=300)


def check(response: httpx.Response, xargs: Any) -> None:
    is_theirs = is_vllms_own_mistake(xargs)
    wrong = () if is_theirs else culprit(xargs or {})
    assert response.status_code == (400 if is_theirs or wrong else 200), response.text
    if response.status_code == 200:
        assert '"error"' not in response.text
    elif wrong:
        message = response.json()["error"]["message"].removesuffix(" (parameter=vllm_xargs)")
        named = (f"vllm_xargs.{key if key.isprintable() else repr(key)}=" for key in wrong)
        assert any(key in message for key in named), message
        assert message.startswith("vllm_xargs."), message
        assert message.endswith("."), message
        assert message.isprintable(), message


@settings(max_examples=100)
@given(
    is_chat=st.booleans(),
    is_streamed=st.booleans(),
    xargs=plausible | st.dictionaries(keys, values, max_size=4) | values,
)
@example(is_chat=False, is_streamed=False, xargs={"kv_budget": 10**400})
@example(is_chat=False, is_streamed=True, xargs={"kv_ratio": float("nan")})
@example(is_chat=True, is_streamed=True, xargs={"kv_ratio": 1e-320})
@example(is_chat=True, is_streamed=False, xargs={"kv_\n": "x" * 5000})
@example(is_chat=False, is_streamed=True, xargs={"kv_budge\ud800": 1})
@example(is_chat=False, is_streamed=False, xargs={"kv_compression": "\ud800"})
@example(is_chat=False, is_streamed=False, xargs={"a": {"b": [1]}})
def test_answer_or_400(server: Server, is_chat: bool, is_streamed: bool, xargs: Any) -> None:
    check(ask(server, is_chat, is_streamed, xargs), xargs)


@pytest.mark.parametrize("is_chat", [False, True], ids=["completion", "chat"])
def test_server_is_well_afterwards(server: Server, is_chat: bool) -> None:
    """Runs after the test above, on the same server; holds for itself as well."""
    for xargs in ({"kv_budget": 0}, {"kv_bugdet": []}, [], {"a": None}):
        assert ask(server, is_chat, True, xargs).status_code == 400
    assert complete(server, prompt(400, seed=51), 8)
    assert wait_until_idle(server).num_used_blocks == 0
    assert "Traceback" not in server.log()
