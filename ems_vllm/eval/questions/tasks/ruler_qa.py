# SPDX-License-Identifier: Apache-2.0
"""RULER's question answering (arXiv 2404.06654), where the user has SQuAD or HotpotQA."""

from __future__ import annotations

import functools
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from ems_vllm.config.errors import ConfigError, shown
from ems_vllm.eval.questions.question import Question
from ems_vllm.eval.questions.sample import Key, Sample, generator
from ems_vllm.eval.questions.tasks.base import TASKS, Task
from ems_vllm.eval.questions.tokenizer import Tokenizer


@dataclass(frozen=True)
class _Item:
    """A question; documents by their number.

    Attributes:
        needed: Documents with the answer.
        related: Documents that distract most.
    """

    question: str
    answers: tuple[str, ...]
    needed: tuple[int, ...]
    related: tuple[int, ...] = ()


class DocumentQuestion(Task):
    """A question whose documents are among as many others as fit.

    Attributes:
        files: Names under which the data set is looked for in `data_path`.
    """

    metric = "string_match_part"
    max_tokens = 32
    files: ClassVar[tuple[str, ...]]

    def sample(self, key: Key, tokenizer: Tokenizer) -> Sample:
        items, documents = _read(self.options.data_path, key.task, self.files)
        # Every seed goes through all questions, in an order of its own.
        order = list(range(len(items)))
        random.Random(key.seed).shuffle(order)
        item = items[order[key.index % len(order)]]
        rng = generator(key)
        others = sorted(set(range(len(documents))) - {*item.needed, *item.related})
        pool = [*item.related, *rng.sample(others, len(others))]
        places = {number: rng.random() for number in (*item.needed, *pool)}

        def build(size: int) -> Question:
            chosen = sorted((*item.needed, *pool[:size]), key=places.__getitem__)
            context = "\n\n".join(
                f"Document {i}:\n{documents[number]}" for i, number in enumerate(chosen, start=1)
            )
            task = (
                "Answer the question based on the given documents. Only give me the answer and do "
                "not output any other words."
            )
            return Question(
                instruction=f"{task}\n\nThe following are given documents.\n\n",
                document=context,
                question=f"\n\n{task}\n\nQuestion: {item.question}",
                answer_prefix=" Answer:",
                references=item.answers,
            )

        # With all documents in, a prompt may be shorter than the length.
        return self.fitted(key, tokenizer, build, minimum=0, maximum=len(pool))


@TASKS.register("qa_1")
class SquadQuestion(DocumentQuestion):
    files = ("squad.json", "dev-v2.0.json")


@TASKS.register("qa_2")
class HotpotQuestion(DocumentQuestion):
    files = ("hotpotqa.json", "hotpot_dev_distractor_v1.json")


@functools.cache
def _read(folder: Path | None, task: str, files: tuple[str, ...]) -> tuple[list[_Item], list[str]]:
    path = next((folder / f for f in files if (folder / f).is_file()), None) if folder else None
    if path is None:
        raise ConfigError(
            f"data_path={shown(str(folder))} has no data for tasks={task!r}: give a folder with "
            f"{' or '.join(files)}, or leave the task out."
        )
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return _squad(data) if isinstance(data, dict) else _hotpot(data)
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"data_path={shown(str(path))} is not the data set's file ({type(error).__name__}: "
            f"{error}): download it again."
        ) from None


def _squad(data: dict[str, Any]) -> tuple[list[_Item], list[str]]:
    articles = [[p["context"] for p in article["paragraphs"]] for article in data["data"]]
    documents = sorted({context for article in articles for context in article})
    number = {context: i for i, context in enumerate(documents)}
    items = [
        _Item(
            question=qa["question"],
            answers=tuple(answer["text"] for answer in qa["answers"]),
            needed=(number[paragraph["context"]],),
            related=tuple(number[c] for c in dict.fromkeys(article) if c != paragraph["context"]),
        )
        for source, article in zip(data["data"], articles, strict=True)
        for paragraph in source["paragraphs"]
        for qa in paragraph["qas"]
        if not qa.get("is_impossible", False)
    ]
    return items, documents


def _hotpot(data: list[dict[str, Any]]) -> tuple[list[_Item], list[str]]:
    texts = [[f"{title}\n{''.join(parts)}" for title, parts in d["context"]] for d in data]
    documents = sorted({text for listed in texts for text in listed})
    number = {text: i for i, text in enumerate(documents)}
    items = [
        _Item(d["question"], (d["answer"],), tuple(number[t] for t in dict.fromkeys(listed)))
        for d, listed in zip(data, texts, strict=True)
    ]
    return items, documents
