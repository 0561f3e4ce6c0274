# SPDX-License-Identifier: Apache-2.0
"""Full-cache accuracy on templates, keys, novels and seeds that training never saw.

Usage (in models/ems-tiny): python -m training.check \\
    --model FOLDER --novels FOLDER --words FILE [--samples 50]

The templates are those of RULER (2404.06654), LongEval and lost-in-the-middle; words of keys come
from the held-out tenth, haystacks from the held-out novels. An answer counts when the output
begins with it (variable tracking: the share of the names that occur in the output).
"""

import argparse
import itertools
import json
import math
import random
import string
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from transformers import AutoTokenizer, LlamaForCausalLM

from training.corpus import HELD_OUT, clean, held_out_word

NOISE = (
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
)
SEED = 7_000_003  # training uses 2412


@dataclass
class Case:
    prompt: str
    expected: list[str]
    new_tokens: int


class Prompts:
    """Builds prompts of about `length` tokens.

    Args:
        tokenizer: The model's.
        texts: Held-out novels, cleaned.
        words: Held-out words.
    """

    def __init__(self, tokenizer: Any, texts: list[str], words: list[str]) -> None:
        self.tokenizer, self.words = tokenizer, words
        self.sentences = [t.replace("? ", "?|").replace(". ", ".|").split("|") for t in texts]

    def size(self, text: str) -> int:
        return len(self.tokenizer.encode(text))

    def haystack(self, rng: random.Random, kind: str, tokens: int) -> list[str]:
        """Sentences, together at most `tokens` tokens."""
        text = rng.choice(self.sentences)
        at = rng.randrange(len(text) // 2)
        source: Iterator[str] = iter(text[at:]) if kind == "novel" else iter([NOISE] * 10_000)
        found: list[str] = []
        used = 0
        for sentence in source:
            used += self.size(sentence)
            if used > tokens:
                break
            found.append(sentence)
        return found

    def key(self, rng: random.Random) -> str:
        return f"{rng.choice(self.words)}-{rng.choice(self.words)}"

    def number(self, rng: random.Random, n: int = 7) -> str:
        return str(rng.randrange(10 ** (n - 1), 10**n))

    def needles(self, rng: random.Random, length: int, kind: str, count: int) -> Case:
        """RULER niah_single (1: noise, 2: text) and niah_multikey_1 (`count` keys)."""
        pairs = [(self.key(rng), self.number(rng)) for _ in range(count)]
        hidden = [f"One of the special magic numbers for {k} is: {v}." for k, v in pairs]
        key, value = rng.choice(pairs)
        head = (
            "A special magic number is hidden within the following text. Make sure to memorize it. "
            "I will quiz you about the number afterwards.\n"
        )
        tail = (
            f"\nWhat is the special magic number for {key} mentioned in the provided text? "
            f"The special magic number for {key} mentioned in the provided text is"
        )
        room = length - self.size(head + tail + " ".join(hidden)) - 12
        hay = self.haystack(rng, kind, room)
        for text in hidden:
            hay.insert(rng.randint(0, len(hay)), text)
        joined = " ".join(hay).replace("\n ", "\n")
        return Case(head + joined + tail, [value], 10)

    def pairs(self, rng: random.Random, length: int, count: int) -> Case:
        """Lost-in-the-middle key-value retrieval, with words and numbers instead of UUIDs."""
        data: dict[str, str] = {}
        while len(data) < count:
            data[self.key(rng)] = self.number(rng, 6)
        key = rng.choice(list(data))
        prompt = (
            "Extract the value corresponding to the specified key in the JSON object below.\n\n"
            f'JSON data:\n{json.dumps(data, indent=0)}\n\nKey: "{key}"\nCorresponding value: "'
        )
        return Case(prompt, [data[key]], 8)

    def lines(self, rng: random.Random, length: int) -> Case:
        """LongEval line retrieval."""
        head = (
            "Below is a record of lines I want you to remember. Each line begins with 'line <line "
            "index>' and contains a '<REGISTER_CONTENT>' at the end of the line as a numerical "
            "value. For each line index, memorize its corresponding <REGISTER_CONTENT>. At the end "
            "of the record, I will ask you to retrieve the corresponding <REGISTER_CONTENT> of a "
            "certain line index. Now the record start:\n\n"
        )
        tail = (
            "\nNow the record is over. Tell me what is the <REGISTER_CONTENT> in line {key}? I "
            "need the number. The <REGISTER_CONTENT> in line {key} is <"
        )
        data: dict[str, str] = {}
        used = self.size(head) + self.size(tail) + 40
        while True:
            key, value = self.key(rng), self.number(rng, 5)
            used += self.size(f"line {key}: REGISTER_CONTENT is <{value}>\n") - 1
            if used > length:
                break
            data[key] = value
        body = "".join(f"line {k}: REGISTER_CONTENT is <{v}>\n" for k, v in data.items())
        key = rng.choice(list(data))
        return Case(head + body + tail.replace("{key}", key), [data[key]], 8)

    def tracking(self, rng: random.Random, length: int) -> Case:
        """RULER vt: one chain of four hops, without the worked example."""
        names = ["".join(rng.choices(string.ascii_uppercase, k=5)) for _ in range(5)]
        value = self.number(rng, 5)
        chain = [f"VAR {names[0]} = {value}"]
        chain += [f"VAR {b} = VAR {a} " for a, b in itertools.pairwise(names)]
        head = (
            "Memorize and track the chain(s) of variable assignment hidden in the following "
            "text.\n\n"
        )
        tail = (
            f"\nQuestion: Find all variables that are assigned the value {value} in the text "
            "above. Answer: According to the chain(s) of variable assignment in the text above, 5 "
            f"variables are assigned the value {value}, they are:"
        )
        hay = self.haystack(rng, "noise", length - self.size(head + tail + "\n".join(chain)) - 45)
        places = sorted(rng.randint(0, len(hay)) for _ in chain)
        for i, (place, text) in enumerate(zip(places, chain, strict=True)):
            hay.insert(place + i, text + "\n")
        return Case(head + "".join(hay) + tail, names, 40)


TASKS: dict[str, Callable[[Prompts, random.Random, int], Case]] = {
    "single, noise": lambda p, rng, n: p.needles(rng, n, "noise", 1),
    "single, novel": lambda p, rng, n: p.needles(rng, n, "novel", 1),
    "4 keys, novel": lambda p, rng, n: p.needles(rng, n, "novel", 4),
    "key-value pairs": lambda p, rng, n: p.pairs(rng, n, {256: 6, 512: 16, 1024: 36}.get(n, 75)),
    "lines": lambda p, rng, n: p.lines(rng, n),
    "variable tracking": lambda p, rng, n: p.tracking(rng, n),
}
# 75 pairs take about 2,000 tokens; there is no longer version.
LENGTHS = {"key-value pairs": (256, 512, 1024, 2048), "lines": (512, 1024, 2048, 4096)}


@torch.inference_mode()
def score(model: LlamaForCausalLM, tokenizer: Any, case: Case) -> float:
    """1 for the right answer (variable tracking: the share of right names)."""
    ids = tokenizer(case.prompt, return_tensors="pt").input_ids
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=case.new_tokens, do_sample=False
    )
    text = tokenizer.decode(out[0, ids.shape[1] :])
    if len(case.expected) == 1:
        return float(text.lstrip().startswith(case.expected[0]))
    return sum(name in text for name in case.expected) / len(case.expected)


@torch.inference_mode()
def bits_per_byte(model: LlamaForCausalLM, tokenizer: Any, texts: list[str], length: int) -> float:
    """Over four stretches of `length` tokens of every text, first token excluded."""
    bits = size = 0.0
    for text in texts:
        for part in range(4):
            at = len(text) * (part + 1) // 6
            ids = tokenizer(text[at : at + 6 * length], return_tensors="pt").input_ids[:, :length]
            logits = model(ids).logits[0, 1:-1].float()
            bits += torch.nn.functional.cross_entropy(
                logits, ids[0, 2:], reduction="sum"
            ).item() / math.log(2)
            size += len(tokenizer.decode(ids[0, 2:]).encode())
    return bits / size


def check(model_folder: Path, novels: Path, words: list[str], samples: int, lengths: list[int],
          tasks: list[str]) -> dict[str, Any]:  # fmt: skip
    """All tasks at all lengths."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = LlamaForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    texts = [clean((novels / f"{name}.txt").read_text("utf-8")) for name in HELD_OUT]
    prompts = Prompts(tokenizer, texts, [w for w in words if held_out_word(w)])
    found: dict[str, Any] = {}
    for task in tasks:
        for length in lengths:
            if length not in LENGTHS.get(task, lengths):
                continue
            rng = random.Random(f"{SEED} {task} {length}")
            cases = [TASKS[task](prompts, rng, length) for _ in range(samples)]
            scores = [score(model, tokenizer, c) for c in track(cases, f"{task} {length}")]
            found.setdefault(task, {})[length] = round(sum(scores) / len(scores), 4)
            print(task, length, found[task][length], flush=True)
    found["bits per byte"] = round(bits_per_byte(model, tokenizer, texts, 1024), 4)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--novels", type=Path, required=True)
    parser.add_argument("--words", type=Path, required=True, help="words.json of the run")
    parser.add_argument("--samples", type=int, default=50)
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--output", type=Path, help="JSON")
    args = parser.parse_args()
    words = json.loads(args.words.read_text())
    found = check(args.model, args.novels, words, args.samples, args.lengths, args.tasks)
    print(json.dumps(found, indent=1))
    if args.output:
        args.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
