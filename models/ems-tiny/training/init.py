# SPDX-License-Identifier: Apache-2.0
"""Initial weights that already look back and compare.

From random weights a small model needs tens of millions of tokens before it discovers attention to
the previous token and, built on it, recall ("induction heads", Olsson et al. 2022). A CPU cannot
spend that. In the spirit of mimetic initialisation (Trockman & Kolter 2023) the heads start close
to such circuits, everything else is random, and all of it is trained:

* one embedding dimension is constant, which gives queries and keys a bias that Llama lacks;
* heads of layer 0 (and half of those of layer 1) look `offset` tokens back, by their rotary phase;
* later heads compare the current token with what those heads wrote, in slow rotary dimensions;
* their values are copied back into the basis of the (tied) embedding.
"""

import math

import torch

from training.model import Llama

OFFSETS = [1, 2, 3, 4, 1, 2, 5, 6]
CONSTANT = 4.0  # of the constant dimension, relative to the others
EMBED_STD = 0.07
WRITE = 0.07  # RMS of what a head adds to the residual stream


def _local_head(q: torch.Tensor, k: torch.Tensor, offset: int, theta: torch.Tensor) -> None:
    """Make a head look `offset` back. q, k: [head_dim, hidden] views, written in place."""
    half = len(theta)
    fast = torch.exp(-0.25 * torch.arange(half).float())
    k[:half, 0] = fast * 1.2
    q[:half, 0] = fast * 1.2 * torch.cos(offset * theta)
    q[half:, 0] = -fast * 1.2 * torch.sin(offset * theta)


@torch.no_grad()
def initialise(model: Llama, seed: int) -> None:
    """Fill all weights of `model` in place; the result depends on the seed alone."""
    c = model.c
    gen = torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float) -> torch.Tensor:
        return torch.randn(*shape, generator=gen) * std

    d, hd, half, group = c.hidden, c.head_dim, c.head_dim // 2, c.heads // c.kv_heads
    theta = c.rope_theta ** (-torch.arange(half).float() / half)
    slow = half // 2
    width = 1 / math.sqrt(d)
    embed = normal(c.vocab, d, std=EMBED_STD)
    embed[:, 0] = EMBED_STD * CONSTANT
    model.model.embed_tokens.weight.copy_(embed)
    # Where layer 0 writes what it saw at an offset: a random rotation per offset, as one map.
    seen = {o: torch.linalg.qr(normal(d, d, std=1.0))[0] for o in sorted(set(OFFSETS))}
    for i, layer in enumerate(model.model.layers):
        att = layer.self_attn
        q = normal(c.heads * hd, d, std=0.3 * width).view(c.heads, hd, d)
        k = normal(c.kv_heads * hd, d, std=0.3 * width).view(c.kv_heads, hd, d)
        v = normal(c.kv_heads * hd, d, std=width).view(c.kv_heads, hd, d)
        v[:, :, 0] = 0
        o = torch.zeros(d, c.heads, hd)
        for h in range(c.heads):
            g = h // group
            local = i == 0 or (i == 1 and g >= c.kv_heads // 2)
            if local:
                offset = OFFSETS[h % len(OFFSETS)]
                _local_head(q[h], k[g], offset, theta)
                o[:, h] = seen[offset] @ v[g].T * WRITE
                continue
            if h % group == 0:
                a = normal(slow, d, std=0.14)
                b = normal(slow, d, std=0.14)
                a[:, 0] = b[:, 0] = 0
                # Key: what stood one before (and two before); query: this token (and one before).
                key = a @ seen[1].T + (b @ seen[2].T if g % 2 else 0)
                query = a + (b @ seen[1].T if g % 2 else 0)
                k[g, slow:half] += key
            q[h, slow:half] += query
            o[:, h] = v[g].T * WRITE
        att.q_proj.weight.copy_(q.reshape(-1, d))
        att.k_proj.weight.copy_(k.reshape(-1, d))
        att.v_proj.weight.copy_(v.reshape(-1, d))
        att.o_proj.weight.copy_(o.reshape(d, -1))
        layer.mlp.gate_proj.weight.copy_(normal(c.intermediate, d, std=width))
        layer.mlp.up_proj.weight.copy_(normal(c.intermediate, d, std=width))
        layer.mlp.down_proj.weight.copy_(normal(d, c.intermediate, std=0.2 * EMBED_STD * width))
