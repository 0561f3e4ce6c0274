# SPDX-License-Identifier: Apache-2.0
"""Model Runner V2 (the GPU's default) and vLLM's TRITON_ATTN, through Triton's interpreter.

Each case runs in a process of its own: the interpreter must be chosen before vLLM is imported.
"""

import interpreter
import pytest
from engine.harness import BLOCK_SIZE, LLAMA, QWEN3, engine, tokens
from processes import fork_script

UNLIMITED = {"recipe": "ems", "budget": 8192}
LIMITED = {
    "recipe": "ems",
    "budget": 32,
    "recent_window": 16,
    "obs_window": 8,
    "recompress_interval": 16,
    "min_blocks_saved": 1,
}
IDENTITY_LENGTHS = (1, BLOCK_SIZE - 1, BLOCK_SIZE, BLOCK_SIZE + 1, 1000, 4000)
COMPRESSED_LENGTHS = (BLOCK_SIZE + 1, 150, 300)

_SCRIPT = """
import json, sys
import torch
torch.cuda.get_device_capability = lambda *args, **kwargs: (9, 0)
from engine.harness import engine, tokens
case = json.loads(sys.argv[1])
prompts = [tokens(length, seed=length) for length in case["lengths"]]
with engine(case["compression"], case["model"], **case["options"]) as probe:
    answers = probe.generate(prompts, case["max_tokens"])
    print(json.dumps({
        "answers": answers,
        "runner": type(probe.worker.model_runner).__module__,
        "backend": probe.worker.model_runner.attn_groups[0][0].backend.get_name(),
        "compactions": probe.stats()["num_compactions"] if case["compression"] else 0,
        "used_at_end": probe.pool.num_gpu_blocks - 1 - probe.pool.get_num_free_blocks(),
    }))
"""

pytestmark = pytest.mark.interpreter


def run_v2(compression, model, lengths, max_tokens, chunk, **options):
    """Greedy answers of the V2 runner, with what ran."""
    case = {
        "compression": compression,
        "model": model,
        "max_tokens": max_tokens,
        "lengths": lengths,
        "options": {"max_num_batched_tokens": chunk, **options},
    }
    found = fork_script(_SCRIPT, case, interpreter.environment())
    assert found["runner"] == "vllm.v1.worker.cpu.model_runner"
    assert found["used_at_end"] == 0
    return found


def run_v1(compression, model, lengths, max_tokens, chunk):
    prompts = [tokens(length, seed=length) for length in lengths]
    with engine(compression, model, max_num_batched_tokens=chunk) as probe:
        return probe.generate(prompts, max_tokens)


@pytest.mark.parametrize("model", [LLAMA, QWEN3], ids=["llama", "qwen3"])
def test_v2_with_unlimited_budget_is_identical_to_plain_vllm(model):
    case = (model, IDENTITY_LENGTHS, 6, 1024)
    found = run_v2(UNLIMITED, *case)
    assert found["compactions"] == 0
    assert found["answers"] == run_v1(None, *case)


def test_v2_compresses_exactly_as_v1():
    case = (LIMITED, LLAMA, COMPRESSED_LENGTHS, 24, 128)
    found = run_v2(*case)
    assert found["compactions"] > 2
    assert found["answers"] == run_v1(*case)


def test_triton_attention_wrapped_compresses_exactly_as_the_cpu_backend():
    """vLLM's own Triton kernels over compressed columns; slow, so one small request."""
    case = (LIMITED, QWEN3, (80,), 10, 128)
    found = run_v2(*case, attention_backend="TRITON_ATTN", max_model_len=512)
    assert found["backend"] == "TRITON_ATTN"
    assert found["compactions"] == 1
    assert found["answers"] == run_v1(*case)
