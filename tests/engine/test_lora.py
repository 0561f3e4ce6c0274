# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters under compression: as in plain vLLM, and never mixed up in the prefix cache."""

import json
from pathlib import Path

import pytest
import torch
from engine.harness import QWEN3, engine, tokens
from safetensors.torch import save_file

pytestmark = pytest.mark.slow

PROMPTS = [tokens(length, seed=length) for length in (420, 30, 610)]
MAX_TOKENS = 40
RANK = 4
LIMITED = {
    "recipe": "knorm",
    "budget": 64,
    "recent_window": 32,
    "recompress_interval": 16,
    "min_blocks_saved": 1,
}
UNLIMITED = {"recipe": "ems", "budget": 8192}


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """Folder of a random adapter of every query and value projection."""
    folder = tmp_path_factory.mktemp("adapter")
    config = json.loads(Path(QWEN3, "config.json").read_text())
    widths = {
        "q_proj": config["num_attention_heads"] * config["head_dim"],
        "v_proj": config["num_key_value_heads"] * config["head_dim"],
    }
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for layer in range(config["num_hidden_layers"]):
        for name, width in widths.items():
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            for part, shape in (("A", (RANK, config["hidden_size"])), ("B", (width, RANK))):
                weight = 0.3 * torch.randn(shape, generator=generator)
                weights[f"{prefix}.lora_{part}.weight"] = weight
    save_file(weights, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "bias": "none"}
    settings |= {"target_modules": list(widths), "base_model_name_or_path": QWEN3}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return str(folder)


def run(compression, adapter):
    """Answers of the base model and of the adapter: one after the other, twice, then together."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    lora = LoRARequest("adapter", 1, adapter)
    params = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True)

    def ask(prompts, adapters):
        outputs = probe.llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts],
            params,
            lora_request=adapters,
            use_tqdm=False,
        )
        return [list(output.outputs[0].token_ids) for output in outputs]

    with engine(compression, QWEN3, enable_lora=True, max_lora_rank=8) as probe:
        alone = [ask([p], [a]) for a in (None, lora) for p in PROMPTS]
        # The prefix cache holds the prompts of both by now.
        again = [ask([p], [a]) for a in (lora, None) for p in PROMPTS]
        together = ask(PROMPTS * 2, [None] * len(PROMPTS) + [lora] * len(PROMPTS))
        probe.assert_pool_is_empty()
        compactions = probe.stats()["num_compactions"] if compression else 0
    answers = [answer for (answer,) in alone]
    assert [answer for (answer,) in again] == answers[len(PROMPTS) :] + answers[: len(PROMPTS)]
    assert together == answers
    return answers, compactions


def test_adapters_answer_as_in_plain_vllm(adapter):
    dense, _ = run(None, adapter)
    unlimited, compactions = run(UNLIMITED, adapter)
    assert unlimited == dense
    assert compactions == 0
    # The adapter does something.
    assert all(a != b for a, b in zip(dense[: len(PROMPTS)], dense[len(PROMPTS) :], strict=True))


def test_adapters_keep_apart_under_compression(adapter):
    limited, compactions = run(LIMITED, adapter)
    assert compactions > 20
    assert all(
        a != b for a, b in zip(limited[: len(PROMPTS)], limited[len(PROMPTS) :], strict=True)
    )
