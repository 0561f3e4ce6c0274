# SPDX-License-Identifier: Apache-2.0
"""Drafts need kernels that the CPU platform does without; that is said before anything loads."""

import pytest
from engine.harness import LLAMA
from vllm.engine.arg_utils import EngineArgs
from vllm.triton_utils import HAS_TRITON

NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2}


@pytest.mark.skipif(HAS_TRITON, reason="with Triton's interpreter n-grams work")
@pytest.mark.parametrize("settings", [{}, {"kv_compression": {"recipe": "ems"}}], ids=["off", "on"])
def test_drafts_are_refused_with_a_sentence(settings):
    args = EngineArgs(LLAMA, speculative_config=NGRAM, additional_config=settings)
    with pytest.raises(NotImplementedError, match=r"method='ngram' needs numba and Triton.*drop"):
        args.create_engine_config()
