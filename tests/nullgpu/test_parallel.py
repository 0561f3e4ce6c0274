# SPDX-License-Identifier: Apache-2.0
"""Tensor parallelism on two null GPUs, each in a process of its own."""

import pytest
from nullgpu.serving import COMPRESSION, REQUESTS, environment
from processes import run_script

_SCRIPT = """
import json, sys
from engine.harness import LLAMA, engine, tokens
case = json.loads(sys.argv[1])
if case["runner"] == 2:
    # Worker processes import this file again.
    from nullgpu import stand_in
    stand_in.install()

def main():
    arguments = {
        "tensor_parallel_size": 2, "dtype": "bfloat16", "max_model_len": 1024, "max_num_seqs": 8,
        "num_blocks": 200, "skip_tokenizer_init": True, "attention_backend": "FLASH_ATTN"}
    with engine(case["compression"], LLAMA, **arguments) as probe:
        prompts = [tokens(length, seed=i) for i, (length, _) in enumerate(case["requests"])]
        answers = probe.generate(prompts, [new for _, new in case["requests"]], detokenize=False)
        probe.assert_pool_is_empty()
        print(json.dumps({
            "answer_lens": [len(answer) for answer in answers],
            "stats": probe.llm.collective_rpc("kv_compression_stats")}))

if __name__ == "__main__":
    main()
"""


@pytest.mark.parametrize("runner", [2, 1])
def test_every_rank_compresses_the_same(runner):
    case = {"runner": runner, "compression": COMPRESSION, "requests": REQUESTS}
    found = run_script(_SCRIPT, case, environment(runner) | {"NULLGPU_COUNT": "2"})
    assert found["answer_lens"] == [num_new for _, num_new in REQUESTS]
    first, second = found["stats"]
    assert first == second
    assert first[0]["num_compactions"] > 0
