# SPDX-License-Identifier: Apache-2.0
"""I1: with a budget of at least the length, the output is token-identical to plain vLLM."""

import pytest
from engine.harness import BLOCK_SIZE, LLAMA, QWEN3, engine, tokens

LENGTHS = (1, BLOCK_SIZE - 1, BLOCK_SIZE, BLOCK_SIZE + 1, 1000, 4000)
MAX_TOKENS = 20
UNLIMITED = {"recipe": "ems", "budget": 8192}


def prompts() -> list[list[int]]:
    return [tokens(length, seed=length) for length in LENGTHS]


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((LLAMA, 64), id="llama-chunk64", marks=pytest.mark.slow),
        pytest.param((LLAMA, 1024), id="llama-chunk1024"),
        pytest.param((LLAMA, 8192), id="llama-chunk8192", marks=pytest.mark.slow),
        pytest.param((QWEN3, 256), id="qwen3-chunk256", marks=pytest.mark.slow),
    ],
)
def setup(request):
    """Model and the largest prompt chunk."""
    return request.param


@pytest.fixture(scope="module")
def plain_answers(setup):
    """Answers of plain vLLM, each prompt alone and all of them in one batch."""
    model, chunk = setup
    with engine(None, model, max_num_batched_tokens=chunk) as dense:
        return [dense.generate([p], MAX_TOKENS)[0] for p in prompts()], dense.generate(
            prompts(), MAX_TOKENS
        )


def test_unlimited_budget_is_identical_to_plain_vllm(setup, plain_answers):
    model, chunk = setup
    alone, batched = plain_answers
    with engine(UNLIMITED, model, max_num_batched_tokens=chunk) as compressed:
        assert [compressed.generate([p], MAX_TOKENS)[0] for p in prompts()] == alone
        assert compressed.generate(prompts(), MAX_TOKENS) == batched
        assert compressed.stats()["num_compactions"] == 0


@pytest.fixture(scope="module")
def limited(setup, plain_answers):
    """An engine that compresses; after plain vLLM, since a process holds one at a time."""
    model, chunk = setup
    with engine({"recipe": "ems", "budget": 64}, model, max_num_batched_tokens=chunk) as probe:
        yield probe


def test_request_that_opts_out_is_identical_to_plain_vllm(limited, plain_answers):
    """The same server compresses other requests in the same batches."""
    alone, _ = plain_answers
    before = limited.stats()["num_compactions"]
    answers = limited.generate(prompts()[-2:], MAX_TOKENS, {"kv_compression": "off"})
    assert answers == alone[-2:]
    assert limited.stats()["num_compactions"] == before
    assert limited.generate(prompts()[:-2], MAX_TOKENS) == alone[:-2]


def test_limited_budget_does_compress(limited):
    """The tests above would pass on an engine that never compresses; this one would not."""
    before = limited.stats()
    answers = limited.generate(prompts()[-2:], MAX_TOKENS)
    assert [len(answer) for answer in answers] == [MAX_TOKENS] * 2
    after = limited.stats()
    assert after["num_compactions"] - before["num_compactions"] == 2
    assert after["num_entries_kept"] - before["num_entries_kept"] == 2 * 64
    limited.assert_pool_is_empty()
