# SPDX-License-Identifier: Apache-2.0
"""How a sample is put to a server: once, in turns, or with a prescribed answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ems_vllm.config.errors import ConfigError
from ems_vllm.eval.questions.sample import Key, Sample
from ems_vllm.eval.questions.tasks.conversation import TURN_TOKENS
from ems_vllm.eval.questions.tokenizer import Message, Tokenizer
from ems_vllm.eval.records.following import NUM_TOP, FullAnswer, follow
from ems_vllm.eval.records.journal import Entry
from ems_vllm.eval.records.method import Method
from ems_vllm.eval.records.prompt_files import AnswerLine
from ems_vllm.eval.records.scoring import scored
from ems_vllm.eval.records.server_settings import ServerSettings
from ems_vllm.eval.server.endpoint import Answer, Endpoint, NoAnswer


@dataclass(frozen=True)
class Asker:
    """Asks for one method.

    Attributes:
        is_compressing: Whether the server takes our arguments; a plain one keeps everything.
        can_prescribe: Whether it runs with our logits processor.
        full_answers: What the full cache answered, for tasks that follow it.
    """

    endpoint: Endpoint
    tokenizer: Tokenizer
    method: Method
    server: ServerSettings
    is_compressing: bool
    can_prescribe: bool
    full_answers: Mapping[Key, FullAnswer] = field(default_factory=dict)

    async def ask(self, sample: Sample) -> Entry:
        """The scored answer; a request without one scores 0 and says why."""
        try:
            if sample.follows_full:
                return await self._follow(sample)
            answer, budget = await self._answer(sample)
        except NoAnswer as reason:
            line = AnswerLine(**_key(sample), error=str(reason))
            return Entry(result=scored(sample, line))
        line = AnswerLine(
            **_key(sample),
            output=answer.text,
            logprobs=answer.logprobs if sample.continuation_token_ids else None,
            prompt_tokens=answer.prompt_tokens or None,
        )
        return Entry(
            result=scored(sample, line),
            num_tokens=answer.num_tokens,
            ttft_s=answer.ttft_s,
            tpot_s=answer.tpot_s,
            kv_budget=budget,
        )

    async def _answer(self, sample: Sample) -> tuple[Answer, int | None]:
        if sample.turns:
            return await self._converse(sample)
        prompt = sample.prompt_token_ids
        budget, xargs = self._arguments(sample, len(prompt))
        if sample.continuation_token_ids:
            forced = sample.continuation_token_ids
            if self.can_prescribe:
                return await self.endpoint.prescribe(prompt, forced, xargs=xargs), budget
            self._need_full(sample)
            return await self.endpoint.predict(prompt, forced), budget
        if sample.written_token_ids:
            if not self.can_prescribe:
                raise cannot_prescribe(sample.task)
            ends = self.tokenizer.end_token_ids()
            answer = await self.endpoint.prescribe(
                prompt,
                sample.written_token_ids,
                num_free_tokens=sample.max_tokens,
                end_token_ids=ends,
                xargs=xargs,
            )
            text = self.tokenizer.decode([t for t in answer.free_token_ids if t not in ends])
            return answer.with_text(_cut(text, sample.stop)), budget
        answer = await self.endpoint.complete(
            prompt, sample.max_tokens, stop=sample.stop, xargs=xargs
        )
        return answer, budget

    async def _follow(self, sample: Sample) -> Entry:
        """The full cache's answer, or how the method follows it."""
        budget, xargs = self._arguments(sample, len(sample.prompt_token_ids))
        written = sample.written_token_ids
        full = None if self.method.is_full else self.full_answers.get(sample.key)
        if full is None and not self.method.is_full:
            raise NoAnswer("the full cache has not answered, so there is nothing to follow")
        answer = await self.endpoint.prescribe(
            sample.prompt_token_ids,
            (*written, *(full.token_ids if full else ())),
            num_free_tokens=0 if full else sample.max_tokens,
            num_top=NUM_TOP,
            end_token_ids=self.tokenizer.end_token_ids(),
            xargs=xargs,
        )
        tops = answer.tops[len(written) :]
        own = full or FullAnswer(token_ids=answer.free_token_ids, tops=tops)
        if not own.token_ids or len(tops) != len(own.token_ids):
            raise NoAnswer("the server did not report the most likely tokens")
        followed = follow(own, tops)
        line = AnswerLine(
            **_key(sample),
            output=self.tokenizer.decode(own.token_ids[: followed.num_same]),
            followed=followed,
            prompt_tokens=answer.prompt_tokens or None,
        )
        return Entry(
            result=scored(sample, line),
            num_tokens=answer.num_tokens,
            kv_budget=budget,
            full_answer=own if self.method.is_full else None,
        )

    async def _converse(self, sample: Sample) -> tuple[Answer, int | None]:
        messages: list[Message] = []
        for i, turn in enumerate(sample.turns):
            messages.append({"role": "user", "content": turn})
            rendered = self.tokenizer.render_chat(messages)
            budget, xargs = self._arguments(sample, len(self.tokenizer.encode_rendered(rendered)))
            is_last = i == len(sample.turns) - 1
            answer = await self.endpoint.chat(
                messages,
                sample.max_tokens if is_last else TURN_TOKENS,
                stop=sample.stop,
                xargs=xargs,
            )
            messages.append({"role": "assistant", "content": answer.text})
        return answer, budget

    def _arguments(self, sample: Sample, prompt_len: int) -> tuple[int | None, dict[str, Any]]:
        """`kv_budget`, and the arguments that carry it."""
        if self.method.is_full:
            return None, {"kv_compression": "off"} if self.is_compressing else {}
        budget = self.method.kv_budget(sample, prompt_len, self.server)
        if budget is None:
            raise NoAnswer(f"a budget of {self.method.budget} leaves no room for a block")
        return budget, {"kv_budget": budget}

    def _need_full(self, sample: Sample) -> None:
        if not self.method.is_full:
            raise cannot_prescribe(sample.task)


def cannot_prescribe(task: str) -> ConfigError:
    """The error for a server without our logits processor."""
    return ConfigError(
        f"tasks={task!r} needs answers that are prescribed: start the server with "
        "--logits-processors ems_vllm.engine.measuring.forced_tokens:ForcedTokens, or leave the "
        "task out."
    )


def _cut(text: str, stop: tuple[str, ...]) -> str:
    ends = [text.index(s) for s in stop if s in text]
    return text[: min(ends)] if ends else text


def _key(sample: Sample) -> dict[str, Any]:
    return {
        "task": sample.task,
        "length": sample.length,
        "seed": sample.seed,
        "index": sample.index,
        "protocol": sample.protocol,
    }
