# SPDX-License-Identifier: Apache-2.0
"""The page "One request's life": nine steps, and for each the modules that take it.

Each module stands on the page once, with the first sentence of its docstring;
tests/test_docs.py fails where one of `ems_vllm/engine` is missing.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from pathlib import Path

ENGINE = Path(__file__).resolve().parents[2] / "ems_vllm" / "engine"
_FOLDERS = ("frontend", "scheduler", "worker", "group", "attention")


@dataclass(frozen=True)
class Step:
    """A step of a request.

    Attributes:
        title: What happens to it.
        process: Where.
        text: Sentences, one a line.
        modules: Below ems_vllm/engine/, in the order in which they are passed.
    """

    title: str
    process: str
    text: tuple[str, ...]
    modules: tuple[str, ...]


STEPS = (
    Step(
        "The server is switched on",
        "API server",
        (
            "The flags become one entry of vLLM's `additional_config`, which travels to every "
            "process, so all of them read the same settings.",
            "What cannot work is refused here, before anything is loaded.",
        ),
        (
            "frontend/arguments.py",
            "frontend/switch_on.py",
            "frontend/compatibility.py",
            "frontend/obstacles.py",
            "refusal.py",
            "kernels.py",
            "cache_dtype.py",
        ),
    ),
    Step(
        "Layers are chosen, the cache is sized and bound",
        "worker",
        (
            "Each full-attention layer declares a spec of ours, so that vLLM's engine core makes "
            "our manager for it.",
            "What compression holds beside the cache is counted before vLLM sizes the pool.",
        ),
        (
            "worker/gpu.py",
            "worker/cpu.py",
            "worker/mixin.py",
            "worker/layer_choice.py",
            "worker/layer_settings.py",
            "worker/declared_specs.py",
            "kv_cache_spec.py",
            "observation.py",
            "worker/memory.py",
            "worker/refusals.py",
            "worker/layer_checks.py",
            "worker/group_builder.py",
            "group/tensors.py",
            "group/compressed_group.py",
            "worker/head_deal.py",
            "worker/head_tables.py",
            "worker/bind.py",
            "worker/start_log.py",
        ),
    ),
    Step(
        "The request comes in",
        "API server",
        (
            "`kv_budget`, `kv_ratio`, `kv_compression` and `kv_protect` of its `vllm_xargs` are "
            "checked; a mistake is an HTTP 400.",
        ),
        ("frontend/request_check.py", "frontend/chat_roles.py"),
    ),
    Step(
        "It is admitted, and has a plan",
        "engine core",
        (
            "From the settings, its options and the length of its prompt follows when which "
            "columns are compacted: a pure function, evaluated here alone.",
            "A hit in the prefix cache ends where the compacted columns begin.",
        ),
        (
            "scheduler/schedulers.py",
            "scheduler/request.py",
            "scheduler/pressure.py",
            "scheduler/guard.py",
            "scheduler/group_spec.py",
            "scheduler/kv_cache_manager.py",
            "scheduler/dealer.py",
            "pools.py",
        ),
    ),
    Step(
        "Every step is ordered",
        "engine core",
        (
            "What is compacted, which prompt queries score, whose last queries are recorded: plain "
            "data that goes along with vLLM's own message to the workers.",
        ),
        ("scheduler/planner.py", "orders.py"),
    ),
    Step(
        "The worker compares the orders with what it holds",
        "worker",
        ("It derives nothing: where orders do not follow upon what it did, the step is refused.",),
        ("worker/step.py", "worker/requests.py", "group/batch.py"),
    ),
    Step(
        "Attention runs over the live columns, and is observed",
        "worker",
        (
            "vLLM's own kernels get block tables without the freed columns.",
            "After each layer, queries of a prompt add to the scores of entries, and the last ones "
            "are recorded.",
        ),
        (
            "attention/wrap.py",
            "attention/flash_attn.py",
            "attention/flashinfer.py",
            "attention/triton_attn.py",
            "attention/flex_attention.py",
            "attention/torch_cpu.py",
            "attention/bindings.py",
            "attention/live_columns.py",
            "attention/head_batch.py",
            "attention/head_rows.py",
            "attention/softmax_lse.py",
            "group/prompt_chunks.py",
            "group/score_store.py",
            "group/query_ring.py",
        ),
    ),
    Step(
        "It is compacted in place, and its columns go back",
        "worker, then in the engine core",
        (
            "At the start of the first step after its prompt, and again every "
            "`recompress_interval` generated tokens, a policy chooses what stays for each kv_head "
            "and what is merged; the result is written into the last columns before the tail.",
            "Once that step's output has been processed, the columns before are free for others.",
            "Where a coverage decides how much of a budget stays, the step's output says what did.",
            "Steps 5 to 8 repeat until the answer ends.",
        ),
        (
            "group/compactor.py",
            "group/covering.py",
            "group/ranks.py",
            "worker/ranks.py",
            "worker/stages.py",
            "worker/kept_columns.py",
            "group/divergence.py",
            "worker/meter.py",
            "worker/reporting.py",
            "report.py",
            "group/compaction_rows.py",
            "group/compaction_context.py",
            "group/layer_stack.py",
            "group/head_tables.py",
            "group/protection.py",
            "group/rope.py",
            "group/output_projection.py",
            "group/cache_scales.py",
            "group/to_device.py",
            "worker/progress_log.py",
            "scheduler/compaction_ledger.py",
        ),
    ),
    Step(
        "The answer says what was held",
        "engine core, then in the API server",
        (
            "What a step did to a request goes along with its next tokens, and what all of them "
            "did with vLLM's statistics: into the `usage` of the answer, and onto /metrics.",
        ),
        (
            "scheduler/accounts.py",
            "scheduler/dense_pool.py",
            "holding.py",
            "totals.py",
            "frontend/holdings.py",
            "frontend/usage.py",
            "frontend/metric_catalogue.py",
            "frontend/metrics.py",
        ),
    ),
)
# Of evaluations, and of the status page: no request of a user passes them.
BESIDE = (
    "measuring/forced_tokens.py",
    "group/kept_positions.py",
    "worker/inspection.py",
    "worker/request_fit.py",
    "status/plugin.py",
    "status/routes.py",
    "status/source.py",
    "status/numbers.py",
    "status/answers.py",
)


def page() -> str:
    lines = [
        "# One request's life",
        "",
        "A request passes three processes of vLLM, and in each of them a folder of "
        "`ems_vllm/engine/`.",
        "",
        "![API server, engine core and workers, with what passes between them; numbers are those "
        "of the steps below](figures/processes.svg)",
        "",
        "| folder | |",
        "|---|---|",
    ]
    lines += [f"| `{folder}/` | {summary(f'{folder}/__init__.py')} |" for folder in _FOLDERS]
    for number, step in enumerate(STEPS, 1):
        lines += ["", f"## {number}. {step.title}", "", f"In the {step.process}.", *step.text, ""]
        lines += [_line(module) for module in step.modules]
    lines += ["", "Beside the way:", "", *map(_line, BESIDE), ""]
    lines += [
        "What the worker does to entries is a [policy](architecture.md), the arithmetic of columns "
        "`ems_vllm/plan.py`, and what vLLM has no extension point for a [patch](patches.md).",
    ]
    return "\n".join(lines) + "\n"


def _line(module: str) -> str:
    return f"* [`{module}`](../ems_vllm/engine/{module}): {summary(module)}"


def summary(module: str) -> str:
    """First sentence of a module's docstring.

    Raises:
        ValueError: there is none.
    """
    text = ast.get_docstring(ast.parse((ENGINE / module).read_text(encoding="utf-8")))
    if text is None:
        raise ValueError(f"{module} has no docstring")
    paragraph = " ".join(text.split("\n\n")[0].split())
    return re.split(r"(?<=\.)\s+(?=[A-Z])", paragraph)[0]
