# SPDX-License-Identifier: Apache-2.0
"""The engine on transformers, on a model of two layers: against transformers and formulas."""

from itertools import islice

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ems_vllm.config import RequestOptions, load_config
from ems_vllm.eval.records.budget import Budget
from ems_vllm.eval.records.method import FULL, TRANSFORMERS, methods_of
from ems_vllm.eval.records.prompt_files import PromptLine
from ems_vllm.eval.transformers_engine import prefill, weights
from ems_vllm.eval.transformers_engine.answer import (
    Vocabulary,
    answer_together,
    answering,
    generated,
)
from ems_vllm.eval.transformers_engine.attention import IMPLEMENTATION
from ems_vllm.eval.transformers_engine.engine import TransformersEngine
from ems_vllm.eval.transformers_engine.paging import from_pages, to_pages
from ems_vllm.eval.transformers_engine.runner import Runner
from ems_vllm.eval.transformers_engine.scored_queries import ScoredQueries, received_attention
from ems_vllm.eval.transformers_engine.server_config import request_options, server_config
from ems_vllm.ops import reference_operators
from ems_vllm.ops.score_queries import is_sampled

pytestmark = pytest.mark.slow

PROMPT = torch.randint(0, 128, (600,), generator=torch.Generator().manual_seed(0)).tolist()


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        initializer_range=0.2,
        eos_token_id=None,
        attn_implementation=IMPLEMENTATION,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def engine(llama):
    return TransformersEngine(llama)


def plain_answer(llama, prompt, count):
    input_ids = torch.tensor([prompt])
    tokens = llama.generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        do_sample=False,
        max_new_tokens=count,
        pad_token_id=0,
    )
    return tokens[0, len(prompt) :].tolist()


def answer(engine, compression, prompt=PROMPT, count=40, **options):
    config = load_config({"recipe": "ems", "min_blocks_saved": 1, **compression})
    asked = RequestOptions(**options)
    scored = engine.scored_queries(len(prompt), config, asked)
    needed = [] if scored is None else [scored]
    prefilled = engine.prefill(prompt, config.obs_window, needed)
    request = engine.request(prefilled, config, asked)
    with reference_operators():
        token_ids = list(islice(generated(prefilled.logits, request.step), count))
    return token_ids, request


@pytest.mark.parametrize(
    ("compression", "options"),
    [({"budget": 2048}, {}), ({"budget": 64}, {"enabled": False})],
    ids=["unlimited", "off"],
)
def test_without_compression_it_is_transformers(llama, engine, compression, options):
    token_ids, request = answer(engine, compression, **options)
    assert token_ids == plain_answer(llama, PROMPT, 40)
    # The last token has not been processed.
    assert request.num_live == len(PROMPT) + 39


@pytest.mark.parametrize("recipe", ["ems", "snapkv", "h2o", "knorm", "streaming_llm", "random"])
def test_a_request_never_holds_more_than_planned(engine, recipe):
    compression = {
        "recipe": recipe, "budget": 64, "recent_window": 32, "recompress_interval": 32,
    }  # fmt: skip
    token_ids, request = answer(engine, compression, count=100)
    assert len(token_ids) == 100
    assert 64 + 32 <= request.num_live <= 64 + 32 + 32 + 16


def test_streaming_llm_keeps_sinks_and_the_newest(llama, engine):
    """What stays is known beforehand, so a masked forward pass gives the next token."""
    compression = {"recipe": "streaming_llm", "budget": 64, "recent_window": 32}
    (first, second), _ = answer(engine, compression, count=2)
    position = len(PROMPT)
    # 600 - 32 tokens are 35 whole blocks; of their 560 entries 64 stay.
    kept = [*range(4), *range(500, position + 1)]
    visible = torch.zeros(position + 1, position + 1, dtype=torch.bool)
    visible[:position, :position] = torch.ones(position, position, dtype=torch.bool).tril()
    visible[position, kept] = True
    with torch.inference_mode():
        logits = llama(torch.tensor([[*PROMPT, first]]), attention_mask=visible[None, None]).logits
    assert int(logits[0, -1].argmax()) == second


@pytest.mark.parametrize("stride", [1, 3])
def test_received_attention_is_the_column_sum_in_every_chunk(stride):
    generator = torch.Generator().manual_seed(1)
    queries = torch.randn(20, 4, 8, generator=generator)
    keys = torch.randn(2, 20, 8, generator=generator)
    expected = torch.zeros(2, 20, dtype=torch.float64)
    for head in range(4):
        for position in range(20):
            visible = keys[head // 2, : position + 1].double()
            shares = (0.5 * visible @ queries[position, head].double()).softmax(0)
            if is_sampled(torch.tensor([position]), stride):
                expected[head // 2, : position + 1] += stride * shares / 2
    scores = torch.zeros(2, 20)
    for start, stop in ((0, 7), (7, 8), (8, 20)):
        scores[:, :stop] += received_attention(queries[start:stop], keys[:, :stop], 0.5, stride)
    torch.testing.assert_close(scores.double(), expected, rtol=1e-5, atol=1e-6)
    if stride == 1:
        torch.testing.assert_close(scores.sum(1), torch.full((2,), 20.0))


def test_prompt_scores_and_queries(engine):
    scored = [ScoredQueries(0), ScoredQueries(400), ScoredQueries(0, 8), ScoredQueries(400, 8)]
    prefilled = engine.prefill(PROMPT, 16, scored)
    assert prefilled.scores.keys() == set(scored)
    for (first, _), scores in prefilled.scores.items():
        assert scores.shape == (2, 2, 600)
        # Every query that counts gives away a share of one in every head, or as many as it counts.
        torch.testing.assert_close(scores.sum(-1), torch.full((2, 2), 600.0 - first))
    assert prefilled.queries.shape == (2, 16, 4, 16)
    short = engine.prefill(PROMPT[:5], 16)
    assert short.queries.shape == (2, 5, 4, 16)
    for begun, whole in zip(short.cache.layers, prefilled.cache.layers, strict=True):
        torch.testing.assert_close(begun.keys, whole.keys[:, :, :5])


def test_a_prompt_in_chunks_is_the_same_prompt(engine, monkeypatch):
    scored = [ScoredQueries(*one) for one in ((0,), (250,), (590,), (0, 4), (300, 4))]
    whole = engine.prefill(PROMPT, 16, scored)
    monkeypatch.setattr(prefill, "_CHUNK", 200)
    monkeypatch.setattr(weights, "_MAX_LOGITS", 4 * 600 * 7)
    chunked = engine.prefill(PROMPT, 16, scored)
    torch.testing.assert_close(chunked.logits, whole.logits)
    torch.testing.assert_close(chunked.queries, whole.queries)
    assert chunked.scores.keys() == whole.scores.keys() == set(scored)
    for queries, scores in chunked.scores.items():
        torch.testing.assert_close(scores, whole.scores[queries])


def test_pages_hold_entries_in_order():
    entries = torch.arange(2 * 3 * 10 * 4).view(2, 3, 10, 4)
    pages = to_pages(entries, 4)
    assert pages.shape == (2, 3, 3, 4, 4)
    assert pages[1, 2, 0, 1].equal(entries[1, 0, 9])
    assert from_pages(pages, 3, 10).equal(entries[:, :, 3:])
    assert from_pages(to_pages(entries[..., 0], 4), 0, 10).equal(entries[..., 0])


def prompt_line(length, **fields):
    return PromptLine(
        task="niah", length=length, depth=None, seed=0, index=0, prompt="",
        prompt_token_ids=PROMPT, max_tokens=5, stop=(), references=(), **fields,
    )  # fmt: skip


def test_methods_ask_for_what_servers_are_asked_for():
    budgets = [Budget.parse(text) for text in ("0.06", "256", "full")]
    chosen = methods_of([FULL, "ems", "ems"], budgets, TRANSFORMERS)
    assert [method.file_name for method in chosen] == [
        "transformers-full.jsonl",
        "transformers-ems-0.06.jsonl",
        "transformers-ems-256.jsonl",
    ]
    config = server_config("ems", 256, {}, block_size=16)
    assert config.budget == 240
    full, fraction, count = chosen
    assert not request_options(full, prompt_line(1000), config, 16).enabled
    # 600 prompt tokens end in a tail of 24; 60 and 256 entries leave two blocks and fourteen.
    assert request_options(fraction, prompt_line(1000), config, 16).budget == 32
    assert request_options(count, prompt_line(1000), config, 16).budget == 224
    # A cell in which some prompt could be without room for a block is left out.
    assert request_options(fraction, prompt_line(700), config, 16) is None


def test_runner_answers_what_has_room(engine, monkeypatch):
    vocabulary = Vocabulary(lambda ids: " ".join(map(str, ids)), ())
    monkeypatch.setattr(
        "ems_vllm.eval.transformers_engine.runner.load_vocabulary", lambda name, model: vocabulary
    )
    prompt = prompt_line(1000)
    chosen = methods_of([FULL, "ems"], [Budget.parse("0.02"), Budget.parse("0.06")], TRANSFORMERS)
    runner = Runner(engine, "", chosen, [prompt], {"merger": "none"})
    answers = dict(runner.answers(prompt, chosen))
    assert list(answers) == [chosen[0], chosen[2]]
    expected = plain_answer(engine.model, PROMPT, 5)
    assert answers[chosen[0]].output == vocabulary.decode(expected)
    assert answers[chosen[2]].output != answers[chosen[0]].output
    assert runner.describe(chosen[2]).settings["merger"] == {"name": "none"}
    assert runner.describe(chosen[0]).settings == {}


def test_runner_predicts_a_continuation_as_if_step_by_step(engine, monkeypatch):
    vocabulary = Vocabulary(str, ())
    monkeypatch.setattr(
        "ems_vllm.eval.transformers_engine.runner.load_vocabulary", lambda name, model: vocabulary
    )
    prompt = prompt_line(1000, continuation_token_ids=tuple(PROMPT[:50]), continuation_bytes=50)
    (method,) = methods_of(["ems"], [Budget.parse("0.06")], TRANSFORMERS)
    # So that it is compressed again on the way.
    runner = Runner(engine, "", [method], [prompt], {"recompress_interval": 16})
    ((_, line),) = runner.answers(prompt, [method])
    config = server_config("ems", 60, {"recompress_interval": 16}, engine.block_size)
    options = request_options(method, prompt, config, engine.block_size)
    scored = engine.scored_queries(len(PROMPT), config, options)
    prefilled = engine.prefill(PROMPT, config.obs_window, [scored])
    request = engine.request(prefilled, config, options)
    with reference_operators():
        (expected,) = answer_together(
            [answering(prompt, prefilled.logits, vocabulary)],
            lambda token_ids: request.step(token_ids[0])[None],
        )
    assert len(line.logprobs) == 50
    assert line.logprobs == pytest.approx(expected.logprobs, abs=1e-4)
