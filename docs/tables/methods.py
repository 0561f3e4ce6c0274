# SPDX-License-Identifier: Apache-2.0
"""Methods: what each is, what it needs, what was measured, what is not served, and their parts."""

from __future__ import annotations

import ast
import inspect
import json
import textwrap
from typing import Any

from ems_vllm.methods.measured import Measured, described
from ems_vllm.methods.method import methods
from ems_vllm.methods.not_served import NOT_SERVED
from ems_vllm.policies.base import ALLOCATORS, MERGERS, SCORERS, SELECTORS, Component
from ems_vllm.policies.paper import Paper
from tables.markdown import percent, table

_GROUPS = ("last", "first", "later", "text")


def catalogue() -> str:
    """A row for each recipe that ships."""
    rows = []
    for one in methods():
        papers = ", ".join(_linked(paper) for paper in one.papers) or "ours"
        time = "" if one.compaction_time is None else one.compaction_time
        rows.append([f"`{one.name}`", one.keeps, papers, ", ".join(one.needs), f"{time}"])
    return table(["recipe", "what stays", "papers", "needs", "time"], rows)


def measured(model: str) -> str:
    """Losses on a model by recipe, the least of questions first."""
    budgets = described(model)["budgets"]
    found = {one.name: one.measured[model] for one in methods() if model in one.measured}
    rows = []
    for name, one in sorted(found.items(), key=lambda item: _mean_loss(item[1])):
        cells = [_loss(one, budget, group) for budget in budgets for group in _GROUPS]
        rows.append([f"`{name}`", *cells])
    head = [f"{percent(budget)}: {group}" for budget in budgets for group in _GROUPS]
    return table(["", *head], rows)


def not_served() -> str:
    """What a server cannot do, why, and what it does instead."""
    rows = [[_cited(one.paper), one.why, one.instead] for one in NOT_SERVED]
    return table(["method", "why", "instead"], rows)


def parts() -> str:
    """What every component says of itself and of its options."""
    lines = []
    for registry in (SCORERS, ALLOCATORS, SELECTORS, MERGERS):
        lines += ["", f"### {registry.kind}", ""]
        for name in registry:
            lines += [*_part(name, registry.get(name)), ""]
    return "\n".join(lines[1:])


def _mean_loss(one: Measured) -> float:
    of_budgets = one.losses.values()
    losses = [of_budget[group] for of_budget in of_budgets for group in _GROUPS[:3]]
    return sum(losses) / len(losses)


def _loss(one: Measured, budget: str, group: str) -> str:
    loss = one.losses[budget][group]
    text = f"{loss:+.3f}" if group == "text" else f"{loss:+.2f}"
    right = one.right[budget].get(group)
    return f"{text} ({right[0]} of {right[1]})" if right else text


def _part(name: str, cls: type[Component]) -> list[str]:
    text = inspect.cleandoc(cls.__doc__ or "")
    lines = [f"**`{name}`**", ""]
    # Each paragraph a line, but for formulas.
    for paragraph in text.split("\n\n"):
        if paragraph.startswith("    "):
            lines += [paragraph, ""]
        else:
            lines += [paragraph.replace("\n", " "), ""]
    documented = _field_docs(cls)
    for option, field in cls.model_fields.items():
        default = "required" if field.is_required() else f"default `{json.dumps(field.default)}`"
        lines.append(f"* `{option}` ({default}): {documented.get(option, '')}".rstrip(": "))
    return lines if cls.model_fields else lines[:-1]


def _field_docs(cls: type[Component]) -> dict[str, str]:
    """What stands under each field, of this class and those that it extends."""
    found: dict[str, str] = {}
    for one in reversed(cls.__mro__):
        if not issubclass(one, Component):
            continue
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(one))).body
        assert isinstance(tree, ast.ClassDef)
        for field, after in zip(tree.body, tree.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                text: Any = getattr(getattr(after, "value", None), "value", None)
                if isinstance(after, ast.Expr) and isinstance(text, str):
                    found[field.target.id] = inspect.cleandoc(text).replace("\n", " ")
    return found


def _linked(paper: Paper) -> str:
    name = f"{paper.method} ({paper.authors} {paper.year})"
    return f"[{name}]({paper.url})" if paper.url else f"{name[:-1]}, {paper.venue})"


def _cited(paper: Paper) -> str:
    return f"**{paper.method}** " + (
        f"[arXiv {paper.arxiv}]({paper.url})" if paper.url else paper.venue
    )
