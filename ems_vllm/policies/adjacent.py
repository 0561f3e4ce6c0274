# SPDX-License-Identifier: Apache-2.0
"""How alike the keys of neighbouring entries are."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.nn.functional import cosine_similarity

from ems_vllm.policies.context import SLICE_BYTES
from ems_vllm.policies.reading import parts

if TYPE_CHECKING:
    from torch import Tensor

    from ems_vllm.policies.context import CompactionContext

SCRATCH_BYTES = SLICE_BYTES
"""What `similarity_to_next` holds beside what it returns."""


def similarity_to_next(context: CompactionContext) -> Tensor:
    """Cosine of each key with that of the entry after it.

    Returns:
        [num_layers, num_rows, num_kv_heads, max_entries], float32; of no meaning for the last
        entry of a row and beyond.
    """
    found = context.new_scores()
    for part in parts(context, 6 * context.num_kv_heads * context.key_cache.shape[-1]):
        for at in part.entries():
            keys = part.keys(slice(at.start, at.stop + 1))
            similarity = cosine_similarity(keys[..., :-1, :], keys[..., 1:, :], dim=-1)
            found[part.place][..., at] = similarity
    return found
