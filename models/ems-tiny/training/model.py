# SPDX-License-Identifier: Apache-2.0
"""A Llama in plain PyTorch, with the parameter names of `transformers.LlamaForCausalLM`.

It differs from that class in two ways only, both for training: positions are an argument (see
`data.stretch`), and logits are computed for chosen positions instead of for all.
"""

from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of the model; `hidden` is the width of the residual stream."""

    vocab: int = 2048
    hidden: int = 128
    intermediate: int = 256
    layers: int = 4
    heads: int = 8
    kv_heads: int = 4
    head_dim: int = 64
    context: int = 4096
    rope_theta: float = 5_000_000.0
    eps: float = 1e-5

    def to_hf(self) -> LlamaConfig:
        """The same model for transformers and vLLM."""
        return LlamaConfig(
            vocab_size=self.vocab,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            max_position_embeddings=self.context,
            rope_parameters={"rope_type": "default", "rope_theta": self.rope_theta},
            rms_norm_eps=self.eps,
            tie_word_embeddings=True,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=3,
            architectures=["LlamaForCausalLM"],
        )

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


class Norm(nn.Module):
    """RMS norm over the last dimension."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        y = F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        # What follows are products in this type: converted once here, not by each of them.
        kind = x.device.type
        return y.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else y


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply RoPE in the half-split layout of Llama.

    Args:
        x: [B, H, T, D].
        cos: [B, 1, T, D/2].
        sin: [B, 1, T, D/2].
    """
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def attend(q: Tensor, k: Tensor, v: Tensor, chunk: int = 256) -> Tensor:
    """Causal attention with grouped heads.

    On a CPU in bf16, products over blocks of queries take half the time of SDPA's kernel, most of
    whose time goes into the backward pass.

    Args:
        q: [B, H, T, D].
        k: [B, G, T, D] with G dividing H.
        v: [B, G, T, D].
        chunk: Queries per block.

    Returns:
        [B, H, T, D].
    """
    if q.device.type != "cpu" or q.dtype != torch.bfloat16:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    b, h, t, d = q.shape
    g = k.shape[1]
    group = h // g
    k, v = k.reshape(b * g, t, d), v.reshape(b * g, t, d)
    future = torch.full((chunk, chunk), float("-inf"), dtype=q.dtype).triu(1)
    found = []
    for start in range(0, t, chunk):
        stop = min(start + chunk, t)
        n = stop - start
        rows = q[:, :, start:stop].reshape(b * g, group * n, d)
        mask = F.pad(future[:n, :n], (start, 0)).repeat(group, 1)[None]
        scores = torch.baddbmm(mask, rows, k[:, :stop].mT, alpha=d**-0.5)
        found.append((scores.softmax(-1) @ v[:, :stop]).view(b, h, n, d))
    return torch.cat(found, 2)


class Attention(nn.Module):
    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.c = c
        self.q_proj = nn.Linear(c.hidden, c.heads * c.head_dim, bias=False)
        self.k_proj = nn.Linear(c.hidden, c.kv_heads * c.head_dim, bias=False)
        self.v_proj = nn.Linear(c.hidden, c.kv_heads * c.head_dim, bias=False)
        self.o_proj = nn.Linear(c.heads * c.head_dim, c.hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        c, (b, t, _) = self.c, x.shape
        # One product, one rotation: on a CPU passes over memory cost more than arithmetic.
        weights = (self.q_proj.weight, self.k_proj.weight, self.v_proj.weight)
        qkv = F.linear(x, torch.cat(weights).to(x.dtype))
        qkv = qkv.view(b, t, -1, c.head_dim).transpose(1, 2)
        qk, v = qkv.split([c.heads + c.kv_heads, c.kv_heads], 1)
        q, k = rotate(qk, cos, sin).split([c.heads, c.kv_heads], 1)
        out = attend(q, k, v)
        return self.o_proj(out.transpose(1, 2).reshape(b, t, -1))


class MLP(nn.Module):
    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden, c.intermediate, bias=False)
        self.up_proj = nn.Linear(c.hidden, c.intermediate, bias=False)
        self.down_proj = nn.Linear(c.intermediate, c.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = Norm(c.hidden, c.eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = Norm(c.hidden, c.eps)
        self.mlp = MLP(c)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Trunk(nn.Module):
    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab, c.hidden)
        self.layers = nn.ModuleList(Layer(c) for _ in range(c.layers))
        self.norm = Norm(c.hidden, c.eps)


class Llama(nn.Module):
    """Llama with tied embeddings."""

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.c = c
        self.model = Trunk(c)
        steps = torch.arange(0, c.head_dim, 2).float() / c.head_dim
        angle = torch.arange(c.context).float()[:, None] * c.rope_theta**-steps
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def forward(self, ids: Tensor, positions: Tensor | None = None) -> Tensor:
        """Hidden states after the last norm.

        Args:
            ids: int64 [B, T].
            positions: int64 [B, T], increasing and below the context; 0..T-1 by default.

        Returns:
            float [B, T, hidden].
        """
        if positions is None:
            positions = torch.arange(ids.shape[1], device=ids.device)[None]
        cos, sin = self.cos[positions][:, None], self.sin[positions][:, None]
        kind = ids.device.type
        if torch.is_autocast_enabled(kind):
            cos, sin = (y.to(torch.get_autocast_dtype(kind)) for y in (cos, sin))
        x = self.model.embed_tokens(ids)
        for layer in self.model.layers:
            x = layer(x, cos, sin)
        return self.model.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """float [..., hidden] -> float [..., vocab]."""
        return F.linear(hidden, self.model.embed_tokens.weight)
