# SPDX-License-Identifier: Apache-2.0
"""Tensor and pipeline parallelism over gloo: answers equal to one process."""

import pytest
from engine.harness import LLAMA, engine, tokens
from processes import run_script

COMPRESSION = {
    "recipe": "ems",
    "budget": 64,
    "recent_window": 32,
    "recompress_interval": 64,
    "min_blocks_saved": 1,
}
LENGTHS = (700, 40, 333, 500)
MAX_TOKENS = 100

# In a process of its own, which the workers are forked or spawned from.
_SCRIPT = """
import json, os, sys
os.environ.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"

def main():
    from vllm import LLM, SamplingParams
    case = json.loads(sys.argv[1])
    llm = LLM(
        case["model"], max_model_len=2048, max_num_seqs=8, dtype="float32",
        max_num_batched_tokens=256, kv_cache_memory_bytes=256 << 20,
        additional_config={"kv_compression": case["compression"]}, **case["parallel"],
    )
    params = SamplingParams(temperature=0, max_tokens=case["max_tokens"], ignore_eos=True)
    inputs = [{"prompt_token_ids": prompt} for prompt in case["prompts"]]
    outputs = llm.generate(inputs, params, use_tqdm=False)
    stats = llm.collective_rpc("kv_compression_stats")
    print(json.dumps({
        "answers": [list(output.outputs[0].token_ids) for output in outputs],
        "layers": [rank[0]["num_layers"] for rank in stats],
        "compactions": [rank[0]["num_compactions"] for rank in stats],
    }))

if __name__ == "__main__":
    main()
"""


@pytest.fixture(scope="module")
def expected():
    prompts = [tokens(length, seed=length) for length in LENGTHS]
    with engine(COMPRESSION, LLAMA, max_model_len=2048) as probe:
        return prompts, probe.generate(prompts, MAX_TOKENS), probe.stats()


@pytest.mark.parametrize(
    ("parallel", "layers"),
    [({"tensor_parallel_size": 2}, [4, 4]), ({"pipeline_parallel_size": 2}, [2, 2])],
    ids=["tensor", "pipeline"],
)
def test_two_workers_answer_as_one(parallel, layers, expected):
    prompts, answers, stats = expected
    case = {
        "model": LLAMA,
        "compression": COMPRESSION,
        "parallel": parallel,
        "prompts": prompts,
        "max_tokens": MAX_TOKENS,
    }
    found = run_script(_SCRIPT, case)
    assert found["answers"] == answers
    assert found["layers"] == layers
    assert found["compactions"] == [stats["num_compactions"]] * 2
