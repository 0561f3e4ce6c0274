# SPDX-License-Identifier: Apache-2.0
"""What layers and their attention backend, once the model is loaded, cannot be combined with."""

from ems_vllm.engine.refusal import Refusal

NO_FULL_ATTENTION = Refusal(
    "model",
    "it has no layer that can be compressed ({layers})",
    "serve a model that has one",
)
SPLIT_BLOCKS = Refusal(
    "block_size",
    "the attention backend splits it into blocks of {native}",
    "choose FLASH_ATTN or TRITON_ATTN with --attention-backend, or start with --block-size "
    "{native}",
)
UNKNOWN_BACKEND = Refusal(
    "attention_backend",
    "compression knows how to observe {known} only",
    "choose {choice} with --attention-backend",
)
MIXED_SCALES = Refusal(
    "model",
    "layers of one KV-cache group have different softmax scales ({scales})",
    "serve another model",
)
MIXED_QUERY_HEADS = Refusal(
    "model",
    "layers of one KV-cache group have different numbers of query heads ({heads}), and the queries "
    "of a group are recorded together",
    "choose a recipe that records none, as knorm",
)
HEAD_SCALES = Refusal(
    "model",
    "its checkpoint scales each kv_head of the fp8 cache on its own ({name})",
    "start with --kv-cache-dtype {dtype}, or serve a checkpoint with one scale per layer",
)
HEAD_SHARES = Refusal(
    "kv_compression_config.allocator",
    "it deals {reason}",
    "set its per_head to false, or choose a profile of this very model",
)
UNSPLIT_HEADS = Refusal(
    "kv_compression_config.allocator",
    "kv_heads cannot hold different numbers of entries here: {reason}",
    "choose the allocator uniform or profile without per_head, or TRITON_ATTN with "
    "--attention-backend where that is the reason",
)
LAYER_SHARES = Refusal(
    "kv_compression_config.allocator",
    "it deals to other layers than are compressed ({reason})",
    "choose the allocator uniform, or a profile of this very model",
)
MIXED_GROUP = Refusal(
    "model",
    "compressed layers need block tables of their own, but vLLM put {name} into one KV-cache "
    "group with layers of another kind",
    "drop --disable-hybrid-kv-cache-manager and VLLM_KV_CACHE_LAYOUT",
)
NO_OUTPUT_WEIGHTS = Refusal(
    "kv_compression_config.selector",
    "{name} has no output projection whose weights can be read",
    "choose another selector, as top_k, or serve a checkpoint whose projection is not quantised",
)
OTHER_PROFILE = Refusal(
    "kv_compression_config.scorer",
    "its profile is of another model: it {reason}",
    "measure this one with `ems-vllm calibrate`, and name the file",
)
LAYER_REFUSALS = (
    NO_FULL_ATTENTION,
    LAYER_SHARES,
    HEAD_SHARES,
    UNSPLIT_HEADS,
    MIXED_GROUP,
    SPLIT_BLOCKS,
    UNKNOWN_BACKEND,
    MIXED_SCALES,
    MIXED_QUERY_HEADS,
    HEAD_SCALES,
    NO_OUTPUT_WEIGHTS,
    OTHER_PROFILE,
)
