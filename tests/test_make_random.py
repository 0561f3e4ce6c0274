# SPDX-License-Identifier: Apache-2.0
"""The random models come out the same every time, and are of use."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytest.importorskip("transformers")

MODELS = Path(__file__).resolve().parents[1] / "models"
TEXT = next((MODELS / "text").glob("*.txt")).read_text()


@pytest.fixture(scope="module")
def make_random() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_random", MODELS / "make_random.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_same_bytes_every_time(make_random: ModuleType, tmp_path: Path) -> None:
    name = "random-qwen3"
    assert make_random.make(name, tmp_path / "a")
    assert make_random.make(name, tmp_path / "b")
    assert contents(tmp_path / "a" / name) == contents(tmp_path / "b" / name)


def test_made_once_and_again_when_outdated(make_random: ModuleType, tmp_path: Path) -> None:
    name = "random-qwen3"
    assert make_random.make(name, tmp_path)
    assert not make_random.make(name, tmp_path)
    (tmp_path / name / make_random.STAMP).write_text(json.dumps({"make_random": "older"}))
    assert make_random.make(name, tmp_path)


def test_tokenizer_is_lossless_and_fills_the_vocabulary(make_random: ModuleType) -> None:
    tokenizer = make_random.train_tokenizer(TEXT)
    assert len(tokenizer) == make_random.COMMON["vocab_size"]
    for text in (TEXT, "naïve 东京 🙂\t\n"):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.decode(ids) == text
    messages = [{"role": "user", "content": "Hello"}]
    chat = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert chat == "<s>user: Hello\nassistant:"


@pytest.mark.parametrize("name", ["random-llama", "random-qwen3"])
def test_attention_is_not_uniform_and_output_varies(make_random: ModuleType, name: str) -> None:
    model = make_random.build(name).eval()
    model.set_attn_implementation("eager")
    ids = make_random.train_tokenizer(TEXT).encode(TEXT[:2000], return_tensors="pt")
    with torch.no_grad():
        attentions = model(ids, output_attentions=True).attentions
        tokens = model.generate(ids, max_new_tokens=40, do_sample=False, eos_token_id=None)[0]
    for layer in attentions:
        # The largest weight of the last query; uniform attention would give 1 / len(ids).
        assert layer[0, :, -1].amax(-1).mean() > 10 / ids.shape[1]
    assert len(set(tokens[ids.shape[1] :].tolist())) > 20
