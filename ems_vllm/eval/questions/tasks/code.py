# SPDX-License-Identifier: Apache-2.0
"""Completion of code that is in the context: this package's own Python files. Ours.

An assistant that edits a file writes most of its lines again. So the samples depend on the version
of the package, too.
"""

from __future__ import annotations

import functools
from pathlib import Path

from ems_vllm.eval.questions.question import Question
from ems_vllm.eval.questions.sample import Key, Sample, generator
from ems_vllm.eval.questions.tasks.base import TASKS, Task
from ems_vllm.eval.questions.tokenizer import Tokenizer

_PACKAGE = Path(__file__).parents[2]
_GIVEN = 3
# The metric skips lines with these marks.
_MARKS = ("#", "`", "//")
_MIN_CHARACTERS = 20


@TASKS.register("code_completion")
class CodeCompletion(Task):
    """Three lines of a file are given, the next one is asked; the place goes through the grid.

    Similarity of the line to the file's, as LongBench measures it.
    """

    metric = "code_similarity"
    max_tokens = 40
    stop = ("\n\n",)

    def sample(self, key: Key, tokenizer: Tokenizer) -> Sample:
        rng = generator(key)
        lines = _lines()
        start = rng.randrange(len(lines))
        depth = self.options.depths[key.index % len(self.options.depths)]

        def build(size: int) -> Question:
            listed = [lines[(start + i) % len(lines)] for i in range(size)]
            place = _place(listed, depth)
            given, asked = listed[place - _GIVEN : place], listed[place]
            quoted = "\n".join(given)
            return Question(
                instruction="Here are the files of a Python package.\n\n",
                document="\n".join(listed),
                question="\n\nWrite some lines of the files above once more.",
                # Not in the question as well: the answer would go on as the question does.
                answer_prefix=f"\n\n{quoted}\n",
                ahead="In the following files of a Python package, find these lines. Which line "
                f"follows them?\n{quoted}",
                neutral_prefix="The next line is:\n",
                references=(asked,),
                depth=depth,
                gold=asked,
            )

        return self.fitted(key, tokenizer, build, minimum=_GIVEN + 1)


@functools.cache
def _lines() -> tuple[str, ...]:
    """All files, each under its path; without the comment that begins every file."""
    found: list[str] = []
    for path in sorted(_PACKAGE.rglob("*.py")):
        _, *lines = path.read_text(encoding="utf-8").splitlines() or [""]
        found += [f"# {path.relative_to(_PACKAGE.parent).as_posix()}", *lines, ""]
    return tuple(found)


def _place(lines: list[str], depth: float) -> int:
    """The line nearest to the depth that is worth asking for; its predecessors are there."""
    places = range(min(_GIVEN, len(lines) - 1), len(lines))
    wanted = depth * len(lines)

    def rank(place: int) -> tuple[bool, float]:
        line, before = lines[place], lines[place - 1]
        is_plain = len(line.strip()) >= _MIN_CHARACTERS and not any(m in line for m in _MARKS)
        is_plain &= not line.startswith(("from ", "import "))
        # Lines that come twice have no single continuation.
        is_known = bool(before.strip()) and lines.count(before) == 1
        return not (is_plain and is_known), abs(place - wanted)

    return min(places, key=rank)
