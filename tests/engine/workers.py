# SPDX-License-Identifier: Apache-2.0
"""Answers of several workers, over gloo, in processes of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from processes import fork_script

_SCRIPT = """
import json, os, sys
os.environ.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"

def main():
    from vllm import LLM, SamplingParams
    case = json.loads(sys.argv[1])
    os.environ.update(case["environment"])
    llm = LLM(
        case["model"], max_model_len=2048, max_num_seqs=8, dtype="float32",
        max_num_batched_tokens=256, kv_cache_memory_bytes=256 << 20,
        additional_config={"kv_compression": case["compression"]}, **case["parallel"],
    )
    params = SamplingParams(
        temperature=0, max_tokens=case["max_tokens"], ignore_eos=True,
        extra_args=case["extra_args"],
    )
    inputs = [{"prompt_token_ids": prompt} for prompt in case["prompts"]]
    outputs = llm.generate(inputs, params, use_tqdm=False)
    stats = llm.collective_rpc("kv_compression_stats")
    print(json.dumps({
        "answers": [list(output.outputs[0].token_ids) for output in outputs],
        "stats": stats,
    }))

if __name__ == "__main__":
    main()
"""


@dataclass(frozen=True)
class Found:
    """What workers did.

    Attributes:
        answers: Token ids by prompt.
        stats: By rank and compressed group of that rank.
    """

    answers: list[list[int]]
    stats: list[list[dict[str, int]]]


def answers_of_workers(
    model: str,
    compression: dict[str, Any],
    parallel: dict[str, Any],
    prompts: Sequence[list[int]],
    max_tokens: int,
    environment: dict[str, str] | None = None,
    extra_args: dict[str, Any] | None = None,
) -> Found:
    """Greedy answers of an engine of several workers.

    Args:
        model: Model folder.
        compression: `additional_config["kv_compression"]`.
        parallel: Arguments of vLLM's LLM.
        prompts: Token ids.
        max_tokens: Of each answer.
        environment: More variables of the workers.
        extra_args: Of every request.
    """
    case = {
        "model": model,
        "compression": compression,
        "parallel": parallel,
        "prompts": list(prompts),
        "max_tokens": max_tokens,
        "environment": environment or {},
        "extra_args": extra_args,
    }
    return Found(**fork_script(_SCRIPT, case))
