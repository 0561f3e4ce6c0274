# SPDX-License-Identifier: Apache-2.0
"""Ask a server about a long text, with its full KV cache and with a compressed one.

Usage: python models/ask.py [QUESTION] [--url URL] [--text FILE] [--budget ENTRIES]

What was kept is read off the server's block pool while it answers, so ask a server that does
nothing else.
"""

from __future__ import annotations

import argparse
import re
import sys
import urllib.error
from dataclasses import dataclass
from pathlib import Path

from openai import APIConnectionError, APIStatusError, OpenAI

from ems_vllm.eval.server.block_pool import read

HERE = Path(__file__).resolve().parent
TEXT = HERE / "text" / "hound_of_the_baskervilles_1_2.txt"
QUESTION = "What date is on the stick?"
PROMPT = """Read the text and answer the question.

Text:
{text}

Question: {question}"""


@dataclass(frozen=True)
class Answer:
    """What a server said.

    Attributes:
        text: The answer.
        num_tokens: Of prompt and answer.
        num_blocks: Of the pool, in use as the answer ended.
    """

    text: str
    num_tokens: int
    num_blocks: int


def first_chapter(text: str) -> str:
    """A text up to its second chapter."""
    return re.split(r"^Chapter 2$", text, maxsplit=1, flags=re.MULTILINE)[0].strip()


def ask(url: str, model: str, prompt: str, xargs: dict[str, int | str]) -> Answer:
    """Ask once, greedily.

    Args:
        url: Of the server.
        xargs: Settings of the request, as `kv_budget`.
    Raises:
        openai.APIError: the server is not there, or refuses.
    """
    stream = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0).chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": prompt}],
        max_tokens=40,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"vllm_xargs": xargs},
    )
    pieces, num_tokens, num_blocks = [], 0, 0
    for event in stream:
        if event.usage:
            num_tokens = event.usage.total_tokens
        pieces += [choice.delta.content or "" for choice in event.choices]
        # Nothing is in use any more once the answer is complete.
        num_blocks = read(url).num_used_blocks or num_blocks
    return Answer("".join(pieces).strip(), num_tokens, num_blocks)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("question", nargs="?", default=QUESTION)
    parser.add_argument("--url", default="http://localhost:8000")
    parser.add_argument("--text", type=Path, help="instead of the first chapter that ships")
    parser.add_argument("--budget", type=int, help="entries per kv_head, if not the server's")
    options = parser.parse_args()
    text = options.text.read_text("utf-8") if options.text else first_chapter(TEXT.read_text())
    prompt = PROMPT.format(text=text.strip(), question=options.question)
    compressed: dict[str, int | str] = {"kv_budget": options.budget} if options.budget else {}
    try:
        client = OpenAI(base_url=f"{options.url}/v1", api_key="none", max_retries=0)
        model = client.models.list().data[0].id
        print(f"{options.question}  ({len(text):,} characters of text, {model})")
        for name, xargs in (("full cache", {"kv_compression": "off"}), ("compressed", compressed)):
            answer = ask(options.url, model, prompt, xargs)
            print(f"{name:>10}: {answer.text}")
            print(f"{'':>10}    {answer.num_tokens:,} tokens in {answer.num_blocks:,} blocks")
    except APIConnectionError:
        print(f"No server answers at {options.url}: start one with `make serve`.", file=sys.stderr)
        return 1
    except (APIStatusError, urllib.error.URLError) as error:
        print(f"The server at {options.url} refuses: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
