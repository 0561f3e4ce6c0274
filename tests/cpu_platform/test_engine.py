# SPDX-License-Identifier: Apache-2.0
"""The whole engine on the CPU platform against Hugging Face's generation, token by token."""

import json
import random
from functools import cache
from pathlib import Path
from typing import Any

import interpreter
import pytest
import torch
from engine.harness import engine
from processes import fork_file

pytest.importorskip("vllm")
pytestmark = pytest.mark.skipif(
    torch.version.cuda is not None, reason="the platform is for torch without an accelerator"
)

GENERATE = Path(__file__).with_name("generate.py")
MODELS = Path(__file__).resolve().parents[2] / "models"
NUM_NEW_TOKENS = 12


def prompts(*lengths: int) -> list[list[int]]:
    generator = random.Random(0)
    return [[generator.randrange(300, 2000) for _ in range(length)] for length in lengths]


@cache
def expected(model: str, *lengths: int) -> list[list[int]]:
    from transformers import AutoModelForCausalLM

    hf_model = AutoModelForCausalLM.from_pretrained(MODELS / model)
    return [
        hf_model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            max_new_tokens=NUM_NEW_TOKENS,
            do_sample=False,
            eos_token_id=None,
        )[0, len(prompt) :].tolist()
        for prompt in prompts(*lengths)
    ]


def generated(
    model: str, lengths: tuple[int, ...], env: dict[str, str] | None = None, **engine_args: Any
) -> list[list[int]]:
    """What an engine in a process of its own generates."""
    arguments = [str(MODELS / model), json.dumps(engine_args), json.dumps(prompts(*lengths))]
    return fork_file(GENERATE, [*arguments, str(NUM_NEW_TOKENS)], env)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["random-llama", "random-qwen3"])
def test_greedy_tokens_with_chunked_prefill(model: str) -> None:
    lengths = (600, 33, 1, 250)
    assert generated(model, lengths, max_num_batched_tokens=128) == expected(model, *lengths)


@pytest.mark.slow
def test_greedy_tokens_with_two_workers() -> None:
    lengths = (90, 7)
    tokens = generated("random-llama", lengths, tensor_parallel_size=2)
    assert tokens == expected("random-llama", *lengths)


@pytest.mark.slow
@pytest.mark.interpreter
def test_greedy_tokens_of_the_second_model_runner() -> None:
    lengths = (90, 7)
    tokens = generated(
        "random-llama", lengths, interpreter.environment(), max_num_batched_tokens=64
    )
    assert tokens == expected("random-llama", *lengths)


@pytest.mark.slow
def test_seeded_tokens_do_not_depend_on_the_chunks_of_the_prompt() -> None:
    """What is sampled at the end of a partial chunk is thrown away, and the draw taken back."""
    (prompt,) = prompts(300)
    answers = []
    for chunk in (64, 512):
        with engine(None, str(MODELS / "random-qwen3"), max_num_batched_tokens=chunk) as probe:
            both = probe.generate([prompt, prompt[:40]], 12, temperature=1.0, seed=5)
            assert probe.generate([prompt], 12, temperature=1.0, seed=6) != both[:1]
            answers.append(both)
    assert answers[0] == answers[1]
