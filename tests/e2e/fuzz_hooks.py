# SPDX-License-Identifier: Apache-2.0
"""What Schemathesis sends to a server besides what its schema suggests, for fuzz_http.py.

Read by Schemathesis in an environment of its own, so it imports nothing of this package.
"""

from __future__ import annotations

import json
import os
import urllib.request
from typing import Any

import schemathesis
from hypothesis import strategies as st

URL, MODEL = os.environ["FUZZ_URL"], os.environ["FUZZ_MODEL"]
KEYS = ("kv_compression", "kv_budget", "kv_ratio", "kv_protect")
# As a name of vLLM's, and of other extensions.
OTHERS = ("kv_bugdet", "KV_PROTECT", "kv", "session_id", "k" * 300, "kv_\n", "kv_\u202e", "")

positions = st.integers(0, 400) | st.sampled_from([2**31, 10**9, 9_999_999_999, 10**10])
ranges = st.tuples(positions, positions).map(lambda pair: f"{pair[0]}-{pair[1]}")
items = (
    ranges
    | st.sampled_from(["system", "last_user", "tools", "none", "0-", "-1-2", "\u0660-\u0663", " "])
    | st.text(max_size=8)
)
protect = (
    st.lists(items, max_size=6)
    | st.lists(items, max_size=4).map(",".join)
    | st.integers(1000, 1100).map(lambda count: ["0-1"] * count)
    | st.integers(1, 1100).map(lambda count: [f"{2 * at}-{2 * at + 1}" for at in range(count)])
)
numbers = (
    st.integers(-2, 300)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from([2**31, 2**63 - 1, 2**63, 2**64, -(2**63), 10**30, 5e-324, 1 - 2**-53])
)
values = st.recursive(
    st.none() | st.booleans() | numbers | st.text(max_size=8) | st.just("x" * 100_000),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=6,
)
near = st.fixed_dictionaries(
    {},
    optional={
        "kv_compression": st.sampled_from(["on", "off"]),
        "kv_budget": numbers,
        "kv_ratio": numbers,
        "kv_protect": protect,
        "mine": values,
    },
).filter(lambda sent: {"kv_budget", "kv_ratio"} - set(sent))
protecting = st.fixed_dictionaries({"kv_protect": protect})
anything = st.dictionaries(st.sampled_from([*KEYS, *OTHERS]) | st.text(), values, max_size=4)
many = st.integers(250, 300).map(lambda count: {f"kv_x{at}": at for at in range(count)})
# Most are near enough to right to come past vLLM's own check of types, as `anything` rarely is.
xargs = st.sampled_from([near] * 4 + [protecting] * 3 + [anything, anything, many, values]).flatmap(
    lambda one: one
)
texts = st.text(max_size=40) | st.just("word " * 400)
tokens = st.lists(st.integers(300, 2000), min_size=1, max_size=8).map(lambda few: (few * 400)[:400])
messages = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "developer", "user", "assistant"]), "content": texts}
    ),
    min_size=1,
    max_size=4,
)
# What bounds the time of a request, which is vLLM's business.
served = st.fixed_dictionaries(
    {"model": st.just(MODEL), "max_tokens": st.integers(1, 3), "vllm_xargs": xargs},
    optional={
        "stream": st.booleans(),
        "n": st.integers(1, 3),
        "stop": st.lists(st.text(min_size=1, max_size=3), max_size=4),
        "echo": st.booleans(),
        "use_beam_search": st.booleans(),
        "request_id": st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
    },
)


@schemathesis.hook
def flatmap_body(ctx: Any, body: Any) -> Any:
    """Of a request for tokens: as the schema has it, but small; or ours."""
    path = ctx.operation.path
    if "completions" not in path:
        return st.just(body)
    prompt = {"messages": messages} if "chat" in path else {"prompt": texts | tokens}
    own = st.tuples(st.fixed_dictionaries(prompt), served).map(lambda pair: {**pair[0], **pair[1]})
    if not isinstance(body, dict):
        return own
    return own | served.map(lambda bounds: {**body, **bounds})


@schemathesis.hook
def flatmap_path_parameters(ctx: Any, path_parameters: Any) -> Any:
    """Of a request that is remembered: one that is, or any."""
    if "FUZZ_NAMES_KNOWN" not in os.environ or "request_id" not in (path_parameters or {}):
        return st.just(path_parameters)
    known = {
        "request_id": st.sampled_from(_remembered()),
        "layer": st.integers(0, 5),
        "kv_head": st.integers(0, 5),
    }
    ours = st.fixed_dictionaries({name: known[name] for name in path_parameters})
    return ours | st.just(path_parameters)


def _remembered() -> list[str]:
    with urllib.request.urlopen(f"{URL}/v1/kv_compression/requests", timeout=60) as answer:
        return [one["request_id"] for one in json.load(answer)]


@schemathesis.check
def answered_or_refused(ctx: Any, response: Any, case: Any) -> None:
    """An answer, or an error as the OpenAI API has it; ours with a sentence of our own."""
    if response.status_code == 200:
        return
    assert 400 <= response.status_code < 500, response.text[:2000]
    if response.status_code in (401, 405):
        return
    assert len(response.content) < 20_000, f"an error of {len(response.content)} bytes"
    error = json.loads(response.content)["error"]
    assert set(error) >= {"message", "type", "param", "code"}
    if error["param"] == "vllm_xargs" and error["message"].startswith("vllm_xargs"):
        sentence = error["message"].removesuffix(" (parameter=vllm_xargs)")
        assert sentence.endswith("."), sentence
        assert sentence.isprintable(), sentence
        assert len(sentence) < 1000, sentence
