# SPDX-License-Identifier: Apache-2.0
"""vLLM's engine in the process of a benchmark."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

BLOCK_SIZE = 16


@contextmanager
def engine(
    model: str, *, dtype: str, longest: int, max_num_seqs: int = 1, **arguments: Any
) -> Iterator[Any]:
    """An `LLM` that can prescribe answers; ended with the block.

    Args:
        longest: Tokens of the longest request, its answer included.
        max_num_seqs: Requests at a time.
        arguments: More of LLM's.
    """
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm import LLM
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    llm = LLM(
        model,
        dtype=dtype,
        max_model_len=longest,
        max_num_seqs=max_num_seqs,
        block_size=BLOCK_SIZE,
        logits_processors=["ems_vllm.engine.measuring.forced_tokens:ForcedTokens"],
        **arguments,
    )
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        cleanup_dist_env_and_memory()
