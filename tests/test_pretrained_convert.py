# SPDX-License-Identifier: Apache-2.0
"""A GGUF file becomes what transformers loads, with the same values and the tokenizer's BOS.

Needs the packages of requirements/models.txt; `make model-smollm2` installs them.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from pretrained.download import CACHE, TOOLS, sha256

_TOOLS = CACHE / f"tools-{sha256(TOOLS)[:12]}"
_HERE = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name)]
pytestmark = pytest.mark.skipif(
    not _TOOLS.is_dir() and len(_HERE) < 2, reason="gguf and accelerate are not installed"
)

# In a process of its own: transformers remembers whether it has found them.
SCRIPT = """
import sys
from pathlib import Path
import gguf, numpy as np, torch
from pretrained.convert import convert

folder, begins = Path(sys.argv[1]), sys.argv[2] == "True"
rng = np.random.default_rng(0)
writer = gguf.GGUFWriter(folder / "tiny.gguf", "llama")
writer.add_context_length(128)
writer.add_embedding_length(64)
writer.add_block_count(1)
writer.add_feed_forward_length(64)
writer.add_head_count(2)
writer.add_head_count_kv(1)
writer.add_rope_freq_base(10000.0)
writer.add_layer_norm_rms_eps(1e-5)
writer.add_vocab_size(8)
writer.add_tokenizer_model("gpt2")
writer.add_tokenizer_pre("smollm")
writer.add_token_list(["<unk>", "<s>", "</s>", "a", "b", "c", "ab", "d"])
writer.add_token_types([3, 3, 3, 1, 1, 1, 1, 1])
writer.add_token_merges(["a b"])
writer.add_bos_token_id(1)
writer.add_eos_token_id(2)
writer.add_pad_token_id(2)
writer.add_unk_token_id(0)
writer.add_add_bos_token(begins)
shapes = {"token_embd": (8, 64), "output_norm": (64,), "blk.0.attn_norm": (64,),
          "blk.0.ffn_norm": (64,), "blk.0.attn_q": (64, 64), "blk.0.attn_k": (32, 64),
          "blk.0.attn_v": (32, 64), "blk.0.attn_output": (64, 64), "blk.0.ffn_gate": (64, 64),
          "blk.0.ffn_up": (64, 64), "blk.0.ffn_down": (64, 64)}
up = None
for name, shape in shapes.items():
    data = rng.standard_normal(shape, dtype=np.float32)
    if len(shape) == 1:
        writer.add_tensor(f"{name}.weight", data)
        continue
    kind = gguf.GGMLQuantizationType.Q8_0
    blocks = gguf.quants.quantize(data, kind)
    writer.add_tensor(f"{name}.weight", blocks, raw_dtype=kind)
    if name.endswith("ffn_up"):
        up = gguf.quants.dequantize(blocks, kind)
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
convert(folder / "tiny.gguf", folder / "model", "somebody/tiny")

from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

weights = load_file(folder / "model" / "model.safetensors")
found = weights["model.layers.0.mlp.up_proj.weight"]
assert found.dtype == torch.bfloat16
assert torch.equal(found, torch.from_numpy(up).to(torch.bfloat16))
AutoModelForCausalLM.from_pretrained(folder / "model")
ids = AutoTokenizer.from_pretrained(folder / "model")("abc")["input_ids"]
assert ids == [1] * begins + [6, 5], ids
"""


@pytest.mark.slow
@pytest.mark.parametrize("begins", [True, False])
def test_weights_tokenizer_and_settings(begins: bool, tmp_path: Path) -> None:
    paths = [str(_TOOLS), *sys.path] if _TOOLS.is_dir() else sys.path
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-c", SCRIPT, str(tmp_path), str(begins)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "model"
    read = {path.stem: json.loads(path.read_text()) for path in folder.glob("*config.json")}
    assert read["config"]["_name_or_path"] == "somebody/tiny"
    assert "quantization_config" not in read["config"]
    assert read["generation_config"]["eos_token_id"] == 2
    assert read["tokenizer_config"]["add_bos_token"] is begins
    assert read["tokenizer_config"]["model_max_length"] == 128
    # A server runs as another user than who made the image.
    assert (folder / "model.safetensors").stat().st_mode & 0o777 == 0o644
