# SPDX-License-Identifier: Apache-2.0
"""LongBench (arXiv 2308.14508): the English and code tasks, from a folder or the Hub.

Prompts, generation lengths and metrics are the benchmark's (configs/tasks/longbench.yaml). Records
come from `NAME.jsonl` in the data folder, else from `data.zip` of THUDM/LongBench on the Hub. A
prompt that is too long is cut in the middle, as the benchmark does; a shorter one stays as it is.
"""

from __future__ import annotations

import functools
import json
import random
import zipfile
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar

import yaml

from ems_vllm.config.errors import ConfigError, shown
from ems_vllm.eval.questions.protocol import LAST, PROTOCOLS
from ems_vllm.eval.questions.question import Question, writer
from ems_vllm.eval.questions.sample import Key, Sample
from ems_vllm.eval.questions.tasks.base import TASKS, Task
from ems_vllm.eval.questions.tokenizer import Tokenizer

PREFIX = "longbench_"
_HUB = "THUDM/LongBench"


class LongBenchTask(Task):
    """One data set.

    Attributes:
        dataset: Its name.
        template: The prompt, with {context} and {input}.
        is_chat: Whether the prompt goes into the model's chat template.
    """

    dataset: ClassVar[str]
    template: ClassVar[str]
    is_chat: ClassVar[bool]

    def sample(self, key: Key, tokenizer: Tokenizer) -> Sample:
        records = _records(self.options.data_path, self.dataset)
        # Every seed goes through all records, in an order of its own.
        order = list(range(len(records)))
        random.Random(key.seed).shuffle(order)
        record = records[order[key.index % len(order)]]
        before, after = self.template.split("{context}")
        before, after = (part.format(input=record["input"]) for part in (before, after))
        token_ids = tokenizer.encode_plain(before + record["context"] + after)

        def build(kept: int) -> Question:
            document = record["context"]
            if kept < len(token_ids):
                half = kept // 2
                head = tokenizer.decode(token_ids[:half])
                tail = tokenizer.decode(token_ids[len(token_ids) - half :])
                # Of a prompt that is cut into its own question, only this protocol can be written.
                if not (head.startswith(before) and tail.endswith(after)):
                    return Question(head + tail, **answers)
                document = head[len(before) :] + tail[: len(tail) - len(after)]
            return Question(document, after, before, **answers)

        answers: dict[str, Any] = {
            "references": tuple(record["answers"]),
            "choices": tuple(record.get("all_classes") or ()),
        }
        write = writer(tokenizer, in_template=self.is_chat)
        return self.fitted(key, tokenizer, build, 2, len(token_ids), write)


@functools.cache
def _records(folder: Path | None, dataset: str) -> list[dict[str, Any]]:
    name = f"{dataset}.jsonl"
    path = folder / name if folder else None
    try:
        if path and path.is_file():
            text = path.read_text(encoding="utf-8")
        else:
            with zipfile.ZipFile(_archive(folder)) as archive:
                text = archive.read(f"data/{name}").decode()
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise ConfigError(
            f"data_path={shown(str(folder))} has no data for tasks='{PREFIX}{dataset}' "
            f"({type(error).__name__}: {error}): give a folder with {name} or with LongBench's "
            "data.zip."
        ) from None


def _archive(folder: Path | None) -> Path:
    """LongBench's archive: in the folder, or downloaded."""
    if folder and (folder / "data.zip").is_file():
        return folder / "data.zip"
    # Imported here: only where a file is missing.
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(_HUB, "data.zip", repo_type="dataset"))
    # Whatever the network of the day brings.
    except Exception as error:
        raise OSError(f"not downloaded from {_HUB}, {type(error).__name__}") from None


def _register() -> None:
    file = resources.files("ems_vllm.configs") / "tasks" / "longbench.yaml"
    for name, settings in yaml.safe_load(file.read_text(encoding="utf-8")).items():
        attributes = {
            "__doc__": f"LongBench's {name}.",
            "__module__": __name__,
            "dataset": name,
            "template": settings["prompt"],
            "metric": settings["metric"],
            "max_tokens": settings["max_tokens"],
            "is_chat": settings["is_chat"],
            "stop": tuple(settings.get("stop", ())),
            # Code goes on where it ends; everything else asks something.
            "protocols": (LAST,) if settings["metric"] == "code_similarity" else PROTOCOLS,
        }
        TASKS.register(PREFIX + name)(type(f"LongBench_{name}", (LongBenchTask,), attributes))


_register()
