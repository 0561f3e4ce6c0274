# SPDX-License-Identifier: Apache-2.0
"""Prints the greedy tokens of an engine as JSON.

Usage: python generate.py MODEL JSON_ENGINE_ARGUMENTS JSON_PROMPTS NUM_NEW_TOKENS
"""

import json
import sys


def main() -> None:
    from vllm import LLM, SamplingParams

    model, engine_args, prompts, num_new_tokens = sys.argv[1], *map(json.loads, sys.argv[2:])
    llm = LLM(model, max_model_len=1024, kv_cache_memory_bytes=64 << 20, **engine_args)
    sampling = SamplingParams(temperature=0, max_tokens=num_new_tokens, ignore_eos=True)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False)
    print(json.dumps([list(output.outputs[0].token_ids) for output in outputs]))


if __name__ == "__main__":
    main()
