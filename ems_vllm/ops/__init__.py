# SPDX-License-Identifier: Apache-2.0
"""The operators of the compression, on paged KV caches.

Every operator writes its outputs in place and returns nothing. Conventions they share:

- A cache is [num_blocks, num_kv_heads, block_size, head_size], with a leading num_layers where all
  layers are handled in one call. Only the last dimension must be contiguous: K and V may be
  interleaved in one tensor, and heads and slots may be swapped in memory.
- Entry e of row r lies in block block_table[r, e // block_size], slot e % block_size. Columns that
  hold no entry of the row are never read.
- Float inputs are float32, bfloat16 or float16, the same for all of one call; sums are float32.
  A cache may be float8_e4m3fn instead (on a GPU not with float32 queries). Its scale, one for a
  whole tensor, matters to scores only: cosines, weighted means, and unit directions with a
  centre's norm do not change when all vectors are multiplied by the same positive number.
- Query head g belongs to kv_head g // (num_heads / num_kv_heads).
- A row without work (length 0) is allowed.

One file per operator. Its function is the contract, the signature and, as a body, the definition in
plain PyTorch: written to be read, in loops and in float32 or float64, sharing no code with the
compiled kernels, which are tested against it. A call runs the kernels; the attribute `reference` of
an operator is the function itself, and within `reference_operators()` that is what calls run.
"""

from ems_vllm.ops.assign_classes import assign_classes
from ems_vllm.ops.head_pages import head_pages
from ems_vllm.ops.key_moments import key_moments
from ems_vllm.ops.key_scores import key_scores
from ems_vllm.ops.library import OPERATORS, implemented_by, reference_operators
from ems_vllm.ops.merge_compact import KeyMerge, merge_compact
from ems_vllm.ops.rank_entries import rank_entries
from ems_vllm.ops.record_queries import record_queries
from ems_vllm.ops.score_queries import score_queries
from ems_vllm.ops.score_window import score_window
from ems_vllm.ops.select_entries import select_entries
from ems_vllm.ops.shift_block_tables import shift_block_tables
from ems_vllm.ops.vector_norms import vector_norms

__all__ = [
    "OPERATORS",
    "KeyMerge",
    "assign_classes",
    "head_pages",
    "implemented_by",
    "key_moments",
    "key_scores",
    "merge_compact",
    "rank_entries",
    "record_queries",
    "reference_operators",
    "score_queries",
    "score_window",
    "select_entries",
    "shift_block_tables",
    "vector_norms",
]
