# SPDX-License-Identifier: Apache-2.0
"""The training loop: resumes exactly, exports what it trained, the schedule ends."""

from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from training.data.batches import Batches
from training.export import export
from training.init import initialise
from training.model import Llama
from training.presets import PRESETS
from training.schedule import Schedule
from training.train import Trainer

TOY = PRESETS["toy"]


def trainer(prepared) -> Trainer:
    _, tokenizer, corpus, names = prepared
    return Trainer(TOY, Batches(tokenizer, corpus, names, TOY.seed, 256, 0.0), "cpu")


def test_resuming_continues_bit_for_bit(prepared, tmp_path: Path) -> None:
    whole = trainer(prepared)
    for step in range(6):
        if step == 3:
            whole.save(tmp_path / "checkpoint.pt")
        whole.train_step()
    resumed = trainer(prepared)
    resumed.load(tmp_path / "checkpoint.pt")
    for _ in range(3):
        resumed.train_step()
    assert (resumed.step, resumed.tokens) == (whole.step, whole.tokens)
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert a.equal(b)


def test_loss_falls(prepared) -> None:
    toy = trainer(prepared)
    losses = [toy.train_step()["answer"] for _ in range(25)]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


def test_exported_model_gives_the_same_logits(prepared, tmp_path: Path) -> None:
    out = prepared[0]
    toy = trainer(prepared)
    toy.train_step()
    for p in toy.model.parameters():
        p.data = p.data.bfloat16().float()  # what the export keeps
    toy.save(out / "checkpoint.pt")
    export(out, TOY.model, tmp_path / "model")
    export(out, TOY.model, tmp_path / "model")  # over the one that is there
    exported = LlamaForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    ids = tokenizer("The number 4071 was written down.", return_tensors="pt").input_ids
    assert ids[0, 0] == 1
    with torch.no_grad():
        ours = toy.model.logits(toy.model(ids))
        theirs = exported(ids).logits
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_digits_are_single_tokens(prepared) -> None:
    tokenizer = prepared[1]
    assert tokenizer.convert_ids_to_tokens(tokenizer("907").input_ids) == ["<s>", "9", "0", "7"]
    text = 'user: "Why?" — 12,5\n'
    assert tokenizer.decode(tokenizer(text).input_ids[1:]) == text


def test_initial_heads_look_back() -> None:
    """Layer 0 attends most to the offset that it was given."""
    model = Llama(PRESETS["cpu"].model)
    initialise(model, 1)
    c, layer, length = model.c, model.model.layers[0], 32
    x = layer.input_layernorm(model.model.embed_tokens(torch.arange(100, 100 + length)[None]))
    q = layer.self_attn.q_proj(x).view(length, c.heads, c.head_dim)
    k = layer.self_attn.k_proj(x).view(length, c.kv_heads, c.head_dim)
    cos, sin = model.cos[:length], model.sin[:length]

    def turn(y: torch.Tensor) -> torch.Tensor:
        a, b = y.chunk(2, -1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)

    for head, offset in ((0, 1), (1, 2), (2, 3)):
        scores = turn(q[:, head]) @ turn(k[:, head // (c.heads // c.kv_heads)]).T
        found = scores[-1].argmax().item()
        assert found == length - 1 - offset


def test_schedule_rises_holds_and_ends() -> None:
    schedule = Schedule(warmup=4)
    assert [schedule.factor(i) for i in (0, 3, 500)] == [0.25, 1.0, 1.0]
    assert not schedule.finished(10**9)
    schedule.begin, schedule.length = 10, 10
    assert schedule.factor(15) == 0.5
    assert schedule.finished(20)
    assert not schedule.finished(19)
