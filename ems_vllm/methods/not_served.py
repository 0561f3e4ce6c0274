# SPDX-License-Identifier: Apache-2.0
"""Methods of which a server cannot do the whole, or nothing: why, and what it does instead."""

from __future__ import annotations

from typing import NamedTuple

from ems_vllm.policies.paper import Paper


class NotServed(NamedTuple):
    """A method.

    Attributes:
        paper: That describes it.
        why: What stands against it.
        instead: What of it is served, or what serves the same purpose.
    """

    paper: Paper
    why: str
    instead: str


NOT_SERVED = (
    NotServed(
        Paper("FastGen", "Ge et al.", 2023, "2310.01801"),
        "It gives each head the cheapest of five policies, two of which keep special tokens and "
        "punctuation: a policy here sees keys, values and attention, not token ids. Its heads grow "
        "by different amounts while decoding, and heads of a request share blocks here.",
        "Sizes of heads by how much attention their best entries hold: `allocator: ada` at the "
        "prompt's end, within a budget; `coverage` for the share of attention that must remain.",
    ),
    NotServed(
        Paper("ThinK", "Xu et al.", 2024, "2407.21018"),
        "It drops channels of keys. In a paged cache all keys have one size: leaving channels out "
        "frees memory only with a second cache format and attention kernels that gather query "
        "channels by head; hiding them, as masks do, frees nothing.",
        "Fewer bits for every channel: `--kv-cache-dtype fp8`, together with any recipe.",
    ),
    NotServed(
        Paper("More Tokens, Lower Precision", "Zhang et al.", 2024, "2412.12706"),
        "vLLM's attention kernels for fewer than 8 bits cannot be observed, so the engine "
        "compresses 16-bit and fp8 caches only.",
        "Eviction and fp8 together: `--kv-cache-dtype fp8 --kv-compression ems`. At equal bytes, "
        "int8, int4 and TurboQuant are measured too (docs/equal-bytes.md).",
    ),
    NotServed(
        Paper("KVzip", "Kim et al.", 2025, "2505.23416"),
        "It reads every prompt twice, the second time as a request to repeat it, before anything "
        "is dropped. A server would have to schedule work that nobody asked for, and hold the "
        "whole prompt until it is done; and what is kept of a shared prefix would be another "
        "cache than the one that prefix caching finds by the tokens' hash.",
        "Its scores, once for a model instead of once for a prompt: `ems-vllm calibrate` measures "
        "what layers and heads need by them, `allocator: profile` deals budgets accordingly "
        "(docs/budgets.md).",
    ),
    NotServed(
        Paper("AttentionPredictor", "Yang et al.", 2025, "2502.04077"),
        "A small convolutional network, trained for a model, predicts the next attention from the "
        "last ones at every step, to choose what to read of a cache that is kept whole. It saves "
        "reads, not memory, and needs attention of every decoding step, which attention kernels do "
        "not give.",
        "Prediction without training: `expected_attention`, `triattention`.",
    ),
    NotServed(
        Paper("LESS", "Dong et al.", 2024, "2402.09398"),
        "What is evicted goes into a state of constant size, through two small networks for each "
        "layer that are trained for a model; attention then adds the state's part to numerator and "
        "denominator, which no attention kernel of vLLM does.",
        "Merging with mass, in which a kept entry answers for what joined it: `merger: ems`, "
        "`clusters`.",
    ),
    NotServed(
        Paper("PoD", "Ma et al.", 2024, "2412.02252"),
        "Distant tokens share keys across consecutive layers: another model, which is trained on "
        "for a while before it answers as before. Nothing to convert without that training.",
        "Layers that keep different amounts: `pyramidkv`, `allocator: profile`.",
    ),
    NotServed(
        Paper("CLLA", "Yang et al.", 2024, "2410.15252"),
        "Layers share a latent cache: an architecture that is trained from the beginning.",
        "Models that come with such a cache (MLA) are refused for now: it is small already.",
    ),
    NotServed(
        Paper("Effectively Compress KV Heads", "Yu et al.", 2024, "2406.07056"),
        "kv_heads are replaced by fewer, of low rank: the weights change, and the paper trains "
        "them afterwards. The result is a model of its own, which vLLM serves as it is.",
        "Any recipe, on the model before or after such a conversion.",
    ),
)
