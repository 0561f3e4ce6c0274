# SPDX-License-Identifier: Apache-2.0
"""Messages that docs/troubleshooting.md quotes still stand in the code."""

import argparse
import ast
import re
from functools import cache
from importlib import util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
QUOTES = re.findall(r"^```output\n(.+)\n```$", PAGE, re.MULTILINE)
# Of vLLM: where it sizes its cache, looks for a device, and loads a scheduler.
VLLM = ("v1/core/kv_cache_utils.py", "config/device.py", "config/scheduler.py")
# How a program begins what it says.
PREFIX = re.compile(r"^(\w+Error: |vllm: error: )")
# A place that is filled in; the page has a word in <>, or what stands there with these flags.
HOLE = "\0"
FILLED = r"(?:<[^<>]+>|--kv-compression ems|[\w'.-]+)"
# Characters, apart from holes, without which a text says nothing of its own.
SAYS_SOMETHING = 20


def literals(path: Path) -> list[str]:
    """Texts in a file, with HOLE for what is filled in."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.JoinedStr):
            parts = (part.value if isinstance(part, ast.Constant) else HOLE for part in node.values)
            found.append("".join(map(str, parts)))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            # As logging, argparse and str.format() fill in.
            found.append(re.sub(r"%[sdg]|{\w+}", HOLE, node.value))
    return found


@cache
def texts() -> tuple[str, ...]:
    spec = util.find_spec("vllm")
    assert spec is not None
    assert spec.submodule_search_locations
    vllm = Path(spec.submodule_search_locations[0])
    paths = [*(ROOT / "ems_vllm").rglob("*.py"), ROOT / "csrc" / "tools" / "nvcc.py"]
    paths += [Path(argparse.__file__), *(vllm / name for name in VLLM)]
    return tuple(text for path in paths for text in literals(path) if len(text) > SAYS_SOMETHING)


def says(text: str, quote: str) -> bool:
    """Whether a text of the code, filled in, is a quote, or begins with it.

    One word in <> may stand for several places, and for what is between them.
    """
    quoted = ".+".join(map(re.escape, re.split("<[^<>]+>", quote)))
    if re.match(quoted, text):
        return True
    words = text.split(HOLE)
    # Most texts have nothing to do with the quote, and a pattern takes its time.
    if sum(map(len, words)) < SAYS_SOMETHING or not all(word in quote for word in words):
        return False
    return re.fullmatch(FILLED.join(map(re.escape, words)), quote) is not None


def test_the_page_quotes_messages() -> None:
    assert len(QUOTES) >= 30
    # Every block of that kind is one line.
    assert len(QUOTES) == PAGE.count("```output")


@pytest.mark.parametrize("quote", QUOTES, ids=lambda quote: quote[:40])
def test_message_stands_in_the_code(quote: str) -> None:
    quote = PREFIX.sub("", quote)
    assert any(says(text, quote) for text in texts()), "change the page: the code says otherwise"


@pytest.mark.parametrize(
    "quote",
    [
        "kv_compression=<name> is no recipe: use <names>, or the path of a .yaml file.",
        "it deals to other layers than were compressed (<layers>)",
        "A request reached the engine checked: <sentence>",
    ],
)
def test_what_the_code_does_not_say_is_noticed(quote: str) -> None:
    assert not any(says(text, quote) for text in texts())
