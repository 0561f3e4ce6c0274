# SPDX-License-Identifier: Apache-2.0
"""Scoring reads the softmax denominators that attention computed, and may not depend on that."""

from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from engine.harness import engine, tokens

from ems_vllm import ops

pytestmark = pytest.mark.slow

SETTINGS = {
    "recipe": "ems",
    "budget": 64,
    "recent_window": 32,
    "recompress_interval": 64,
    "min_blocks_saved": 1,
}
LSE = 8


def answers_and_calls(prompts, keep: bool):
    """Answers of an engine, and (lse given, scores with it, scores without it) of each call."""
    calls = []
    score_queries = ops.score_queries

    def both(*args):
        *inputs, scores = args
        lse = inputs[LSE]
        recomputed = scores.clone()
        score_queries(*inputs[:LSE], None, *inputs[LSE + 1 :], recomputed)
        if not keep:
            inputs[LSE] = None
        score_queries(*inputs, scores)
        calls.append((lse is not None, scores.clone(), recomputed))

    with mock.patch.object(ops, "score_queries", both), engine(SETTINGS) as probe:
        # One at a time: chunks of several requests would come in another order.
        answers = [probe.generate([prompt], 24) for prompt in prompts]
    return answers, calls


def test_scores_are_the_same_with_the_lse_of_attention():
    # The last chunk of the second prompt is a single query, which takes another path.
    prompts = [tokens(300, seed=1), tokens(257, seed=2)]
    given, calls = answers_and_calls(prompts, keep=True)
    computed, _ = answers_and_calls(prompts, keep=False)
    assert given == computed
    assert len(calls) > 4
    for was_given, scores, recomputed in calls:
        assert was_given
        # Pages that no request has written may hold anything, the same in both.
        torch.testing.assert_close(scores, recomputed, rtol=1e-4, atol=1e-6, equal_nan=True)


@pytest.fixture
def flash_attn():
    """The wrapped FLASH_ATTN, whose kernels need a GPU."""
    pytest.importorskip("vllm.v1.attention.backends.flash_attn")
    from ems_vllm.engine.attention import flash_attn

    return flash_attn


def attend(flash_attn, kernel, *, version=3, sinks=None, scores_queries=True):
    """Run FlashAttention's implementation around a stand-in for its kernel.

    Returns:
        Arguments of the kernel's one call, and the LSE that the layer's binding was given.
    """
    impl = flash_attn.CompressedFlashAttentionBackend.get_impl_cls()
    layer_impl = impl.__new__(impl)
    vars(layer_impl).update(
        vllm_flash_attn_version=version,
        attn_type="decoder",
        head_size=8,
        num_kv_heads=2,
        kv_cache_dtype="auto",
        supports_quant_query_input=False,
        dcp_world_size=1,
        sliding_window=(-1, -1),
        fa4_hd256=False,
        scale=1.0,
        alibi_slopes=None,
        logits_soft_cap=0.0,
        sinks=sinks,
        compression=mock.Mock(scores_queries=scores_queries),
    )
    metadata = mock.Mock(
        num_actual_tokens=3,
        query_start_loc=torch.tensor([0, 3]),
        causal=True,
        mm_prefix_query_range_tensor=None,
        rswa_prefix_lens=None,
        max_num_splits=0,
    )
    scale = torch.ones(1)
    query = torch.randn(5, 4, 8)
    with mock.patch("vllm.v1.attention.backends.flash_attn.FA4DenseAttentionKernel.kernel", kernel):
        output = layer_impl.forward(
            SimpleNamespace(_q_scale=scale, _k_scale=scale, _v_scale=scale),
            query,
            None,
            None,
            torch.zeros(2, 2, 16, 16),
            metadata,
            torch.zeros(5, 4, 8),
        )
    assert torch.all(output[:3] == 7)
    (call,) = layer_impl.compression.observe.call_args_list
    return kernel.call_args.kwargs, call.args[2]


def kernel() -> mock.Mock:
    """Writes sevens; returns what FlashAttention's function does."""
    lse = torch.arange(12.0).view(4, 3)

    def run(*, out, return_softmax_lse=False, **others):
        out.fill_(7)
        return (out, lse) if return_softmax_lse else out

    return mock.Mock(side_effect=run)


def test_flash_attention_hands_its_lse_over(flash_attn):
    arguments, lse = attend(flash_attn, kernel())
    assert arguments["return_softmax_lse"]
    assert torch.equal(lse, torch.arange(12.0).view(4, 3).t())


@pytest.mark.parametrize(
    "case",
    [
        # Its denominators count the sinks in; scores leave them out.
        {"sinks": torch.zeros(4)},
        # Another kernel would be compiled.
        {"version": 4},
        {"scores_queries": False},
    ],
    ids=lambda case: next(iter(case)),
)
def test_flash_attention_is_left_as_it_is(flash_attn, case):
    arguments, lse = attend(flash_attn, kernel(), **case)
    assert "return_softmax_lse" not in arguments
    assert lse is None
