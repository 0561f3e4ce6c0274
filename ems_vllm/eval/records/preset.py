# SPDX-License-Identifier: Apache-2.0
"""What an evaluation runs: `configs/eval/*.yaml`, or a file of the user's own."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from ems_vllm.config import recipes as policies
from ems_vllm.config.errors import ConfigError, from_pydantic, shown
from ems_vllm.eval.questions.protocol import LAST, Protocol
from ems_vllm.eval.questions.tasks import TASKS, TaskOptions
from ems_vllm.eval.questions.tokenizer import PromptFormat
from ems_vllm.eval.records.budget import Budget
from ems_vllm.eval.records.method import FULL
from ems_vllm.eval.records.server_settings import Count, ServerSettings

LM_EVAL = "lm_eval:"


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TaskSettings(_Settings):
    """What is different for one task."""

    lengths: tuple[Count, ...] | None = None
    samples: Count | None = None


class Preset(_Settings):
    """What is asked, of which methods.

    Attributes:
        tasks: Names of tasks; `lm_eval:NAME` runs a task of lm-evaluation-harness.
        protocols: Where questions stand. A task is asked in those that it can be written in.
        lengths: Context lengths in tokens, prompt and answer together.
        seeds: Each gives samples of its own.
        samples: A task, length and seed.
        per_task: Lengths and samples that differ for a task.
        recipes: Methods: names of recipes or their YAML files. The full cache always runs.
        budgets: Entries per kv_head, or fractions of the length, sinks and window included.
        depths: Of the tasks with a grid.
        max_tokens: Upper bound of a task's generation length.
        stop: Texts that end any answer.
        prompt_format: "chat" wraps prompts in the model's chat template.
        text_path, data_path: As in TaskOptions.
        concurrency: Requests at a time.
    """

    name: str
    tasks: tuple[str, ...]
    protocols: Annotated[tuple[Protocol, ...], Field(min_length=1)] = (LAST,)
    lengths: tuple[Count, ...]
    seeds: tuple[int, ...] = (0,)
    samples: Count
    per_task: dict[str, TaskSettings] = {}
    recipes: tuple[str, ...]
    budgets: tuple[int | float, ...]
    depths: tuple[Annotated[float, Field(ge=0, le=1)], ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    max_tokens: Count | None = None
    stop: tuple[str, ...] = ()
    prompt_format: PromptFormat = "completion"
    text_path: Path | None = None
    data_path: Path | None = None
    concurrency: Count = 16
    server: ServerSettings = ServerSettings()

    @field_validator("tasks")
    @classmethod
    def _known_tasks(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            if not name.startswith(LM_EVAL):
                try:
                    TASKS.get(name)
                except KeyError as error:
                    raise ConfigError(
                        f"tasks={shown(name)} is not a task: {error.args[0]}."
                    ) from None
        return tuple(dict.fromkeys(value))

    @field_validator("protocols")
    @classmethod
    def _once(cls, value: tuple[Protocol, ...]) -> tuple[Protocol, ...]:
        return tuple(dict.fromkeys(value))

    @field_validator("recipes")
    @classmethod
    def _known_recipes(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            if name != FULL:
                policies.load(name)
        return tuple(dict.fromkeys(name for name in value if name != FULL))

    @field_validator("budgets")
    @classmethod
    def _known_budgets(cls, value: tuple[int | float, ...]) -> tuple[int | float, ...]:
        for budget in value:
            Budget.parse(budget)
        return tuple(dict.fromkeys(value))

    @property
    def task_options(self) -> TaskOptions:
        return TaskOptions(
            depths=self.depths,
            max_tokens=self.max_tokens,
            stop=self.stop,
            text_path=self.text_path,
            data_path=self.data_path,
        )

    def with_command_line(self, *, lengths: bool, samples: bool, args: list[str] | None) -> Preset:
        """What the command line gave wins over settings of single tasks.

        Args:
            lengths, samples: Whether it gave them.
            args: Further arguments of `vllm serve`.
        """
        per_task = {
            task: TaskSettings(
                lengths=None if lengths else own.lengths, samples=None if samples else own.samples
            )
            for task, own in self.per_task.items()
        }
        server = self.server.model_copy(update={"args": (*self.server.args, *(args or ()))})
        return self.model_copy(update={"per_task": per_task, "server": server})

    def protocols_of(self, task: str) -> tuple[Protocol, ...]:
        """Those that the task can be written in; the harness writes its own prompts."""
        possible = (LAST,) if task.startswith(LM_EVAL) else TASKS.get(task).protocols
        return tuple(protocol for protocol in self.protocols if protocol in possible)

    def lengths_of(self, task: str) -> tuple[int, ...]:
        own = self.per_task.get(task)
        return self.lengths if own is None or own.lengths is None else own.lengths

    def samples_of(self, task: str) -> int:
        own = self.per_task.get(task)
        return self.samples if own is None or own.samples is None else own.samples


def names() -> list[str]:
    """Presets that ship with the package."""
    return sorted(f.name.removesuffix(".yaml") for f in _folder().iterdir())


def load(name: str, overrides: dict[str, Any]) -> Preset:
    """A preset with some of its settings replaced.

    Args:
        name: A shipped one, or the path of a YAML file.
        overrides: None leaves a setting as it is.

    Raises:
        ConfigError: there is no such preset, or a setting is wrong.
    """
    if name in names():
        with resources.as_file(_folder() / f"{name}.yaml") as path:
            data = policies.read_file(path, "preset")
    elif name.endswith((".yaml", ".yml")):
        data = policies.read_file(Path(name), "preset")
    else:
        raise ConfigError(
            f"preset={shown(name)} is not a preset: use {', '.join(names())}, or the path of a "
            ".yaml file."
        )
    changed = {key: value for key, value in overrides.items() if value is not None}
    try:
        return Preset.model_validate({"name": Path(name).stem, **data, **changed})
    except ValidationError as error:
        raise from_pydantic(error, "preset.", Preset.model_fields) from None


def _folder() -> Any:
    return resources.files("ems_vllm.configs") / "eval"
