# SPDX-License-Identifier: Apache-2.0
"""The model that is packed for a GPU machine comes back as it was."""

import json

import numpy as np
import pytest
import torch
from gpu import gguf_llama, packed_model, unpack_model
from safetensors.torch import load_file


def blocks(kind: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Blocks of ggml with random contents, and their values, one at a time."""
    generator = np.random.default_rng(0)
    scales = generator.standard_normal((count, 2)).astype(np.float16)
    data, found = [], []
    for scale, offset in scales:
        if kind == "Q8_0":
            codes = generator.integers(-128, 128, 32, dtype=np.int8)
            data.append(scale.tobytes() + codes.tobytes())
            found.append([np.float32(scale) * np.float32(code) for code in codes])
        else:
            codes = generator.integers(0, 256, 16, dtype=np.uint8)
            data.append(scale.tobytes() + offset.tobytes() + codes.tobytes())
            nibbles = [code % 16 for code in codes] + [code // 16 for code in codes]
            found.append([np.float32(n) * np.float32(scale) + np.float32(offset) for n in nibbles])
    return np.frombuffer(b"".join(data), np.uint8), np.array(found, np.float32)


@pytest.mark.parametrize("kind", ["Q4_1", "Q8_0"])
def test_quantised_tensors_come_back_as_ggml_defines_them(kind):
    data, expected = blocks(kind, 12)
    planes = gguf_llama.planes(kind, data)
    found = gguf_llama.values(kind, planes, (4, 96))
    np.testing.assert_array_equal(found, expected.reshape(4, 96))


def test_other_types_are_refused():
    with pytest.raises(ValueError, match="Q6_K"):
        gguf_llama.planes("Q6_K", np.zeros(210, np.uint8))


def test_rotary_pairs_become_halves():
    config = {"num_attention_heads": 2, "num_key_value_heads": 1}
    rows = np.arange(8, dtype=np.float32)[:, None]
    query = gguf_llama.hf_weight("blk.0.attn_q.weight", rows, config)
    assert query.flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    key = gguf_llama.hf_weight("blk.0.attn_k.weight", rows, config)
    assert key.flatten().tolist() == [0, 2, 4, 6, 1, 3, 5, 7]
    value = gguf_llama.hf_weight("blk.0.attn_v.weight", rows, config)
    assert value.flatten().tolist() == list(range(8))


def test_a_model_in_two_folders_is_put_together(tmp_path):
    data, expected = blocks("Q4_1", 4)
    norm = np.array([1.5, -2.25, 3.0], np.float32)
    tensors = {
        "output_norm.weight": ("F32", norm, norm),
        "blk.7.ffn_up.weight": ("Q4_1", data, expected),
    }
    index, folders = [], [tmp_path / "a", tmp_path / "b"]
    for number, (name, (kind, raw, found)) in enumerate(tensors.items()):
        streams = [packed_model.compressed(plane) for plane in gguf_llama.planes(kind, raw)]
        folders[number].mkdir()
        (folders[number] / packed_model.part_name(number)).write_bytes(b"skip" + b"".join(streams))
        sizes = tuple(map(len, streams))
        index.append(packed_model.PackedTensor(name, kind, found.shape, number, 4, sizes))
    config = {"num_attention_heads": 1, "num_key_value_heads": 1}
    packed_model.write_index(folders[0], index, {"config.json": json.dumps(config)})
    assert unpack_model.unpack(folders, tmp_path / "model") == 2
    weights = load_file(tmp_path / "model" / "model.safetensors")
    up = weights.pop("model.layers.7.mlp.up_proj.weight")
    assert torch.equal(up, torch.from_numpy(expected).to(torch.bfloat16))
    assert weights.pop("model.norm.weight").tolist() == norm.tolist()
    assert not weights
    assert json.loads((tmp_path / "model" / "config.json").read_text()) == config
    with pytest.raises(FileNotFoundError, match="part1"):
        unpack_model.unpack(folders[:1], tmp_path / "other")
