# SPDX-License-Identifier: Apache-2.0
"""A question about a document, and how each protocol writes it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ems_vllm.eval.questions.protocol import FIRST, LATER, Protocol
from ems_vllm.eval.questions.tokenizer import Tokenizer


@dataclass(frozen=True)
class Question:
    """What a task writes, and what is right.

    The prompt of protocol "last" is the first four fields as they follow each other.

    Attributes:
        instruction: Before the document where the question is known or announced: what will be
            asked, what to remember. "later" leaves it out.
        document: What is compressed.
        question: What is asked, with the white space that sets it off from the document.
        answer_prefix: How the answer begins; the model goes on from there.
        ahead: What "first" asks before the document; by default instruction and question.
        neutral_prefix: The answer prefix without a word of the question, for "first".
        references, choices, depth: As in Sample.
        gold: The first reference as it follows the answer prefix; by default a space and the
            reference.
    """

    document: str
    question: str = ""
    instruction: str = ""
    answer_prefix: str = ""
    ahead: str | None = None
    neutral_prefix: str = "Answer:"
    references: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    depth: float | None = None
    gold: str | None = None

    @property
    def body(self) -> str:
        """All but the answer prefix."""
        return self.instruction + self.document + self.question

    @property
    def gold_text(self) -> str:
        if self.gold is not None or not self.references:
            return self.gold or ""
        return f" {self.references[0]}"


@dataclass(frozen=True)
class Writing:
    """A question in one protocol.

    Attributes:
        prompt: As the model sees it.
        token_ids: Of the prompt.
        written_token_ids: What follows once the prompt has been processed.
        lead_token_ids: As in Sample.
    """

    prompt: str
    token_ids: tuple[int, ...]
    written_token_ids: tuple[int, ...] = ()
    lead_token_ids: tuple[int, ...] = ()

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids) + len(self.written_token_ids)


Writer = Callable[[Question, Protocol], Writing]


def writer(tokenizer: Tokenizer, *, in_template: bool = True) -> Writer:
    """Writes questions as prompts.

    In a chat template, "first" puts instruction and question into the system's turn. "later" opens
    the user's turn with the document; the question ends the turn and begins the assistant's. Its
    tokens are those of its own text: nothing is merged across the end of the document, which has
    been processed before the question is there.

    Args:
        tokenizer: Its prompt format says whether there is a template.
        in_template: False writes outside of it, whatever the format is.
    """

    def texts(question: Question, protocol: Protocol) -> tuple[str, str]:
        """Of the prompt, and of what follows once it has been processed."""
        if protocol == LATER:
            before, after = "", ""
            if in_template:
                before, after = tokenizer.around_message()
            prompt = before + question.document
            written = question.question + after + question.answer_prefix
            return prompt if in_template else tokenizer.render_plain(prompt), written
        if protocol == FIRST:
            asked = question.ahead
            if asked is None:
                asked = f"{question.instruction.strip()}\n{question.question.strip()}".strip()
            if in_template:
                prompt = tokenizer.render_first(asked, question.document, question.neutral_prefix)
                return prompt, ""
            text = f"{asked}\n\n{question.document}\n\n{question.neutral_prefix}"
            return tokenizer.render_plain(text), ""
        if in_template:
            return tokenizer.render(question.body, question.answer_prefix), ""
        return tokenizer.render_plain(question.body + question.answer_prefix), ""

    def write(question: Question, protocol: Protocol) -> Writing:
        prompt, written = texts(question, protocol)
        written_token_ids = tokenizer.encode_plain(written) if written else ()
        lead_token_ids: Sequence[int] = ()
        if protocol == FIRST and question.answer_prefix:
            lead_token_ids = tokenizer.encode_plain(f" {question.answer_prefix.strip()}")
        return Writing(
            prompt,
            tuple(tokenizer.encode(prompt)),
            tuple(written_token_ids),
            tuple(lead_token_ids),
        )

    return write
