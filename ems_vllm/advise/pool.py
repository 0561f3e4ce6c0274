# SPDX-License-Identifier: Apache-2.0
"""The pool that requests share, from what a server is started with."""

from __future__ import annotations

from dataclasses import dataclass

from ems_vllm.capacity import pool_columns
from ems_vllm.config import ConfigError
from ems_vllm.config.cache_shape import CacheShape


@dataclass(frozen=True)
class Pool:
    """A server's KV cache.

    Attributes:
        columns: That requests may hold.
        num_bytes: Of all GPUs together.
        max_num_seqs: Requests that may run at a time; None: no limit of that kind.
    """

    columns: int
    num_bytes: int
    max_num_seqs: int | None = None


def read_pool(
    shape: CacheShape,
    block_size: int,
    pool_gib: float | None,
    kv_cache_memory_bytes: int | None,
    tensor_parallel_size: int,
    max_num_seqs: int | None,
) -> Pool | None:
    """The pool that is described; None where nothing was said.

    Args:
        shape: Of the model's cache.
        block_size: Tokens per block.
        pool_gib: GiB of all GPUs together.
        kv_cache_memory_bytes: As of vLLM: on each GPU.
        tensor_parallel_size: GPUs that share each layer.
        max_num_seqs: As of vLLM.

    Raises:
        ConfigError: the two contradict each other, or the pool is not for these layers alone.
    """
    if pool_gib is None and kv_cache_memory_bytes is None:
        return None
    if pool_gib is not None and kv_cache_memory_bytes is not None:
        raise ConfigError(
            f"pool_gib={pool_gib:g} and kv_cache_memory_bytes={kv_cache_memory_bytes} are two sizes"
            " of one pool: give one of them."
        )
    if pool_gib is not None:
        if not pool_gib > 0:
            raise ConfigError(f"pool_gib={pool_gib} is not allowed: give a number of GiB above 0.")
        num_bytes = int(pool_gib * 2**30)
    else:
        assert kv_cache_memory_bytes is not None
        num_bytes = kv_cache_memory_bytes * tensor_parallel_size
    if shape.other_layers:
        raise ConfigError(
            f"The pool is shared with layers of another kind in this model "
            f"({', '.join(shape.other_layers)}), so what fits cannot be reckoned here: leave out "
            "the size of the pool, and ask `ems-vllm doctor MODEL`."
        )
    columns = pool_columns(num_bytes, shape.column_bytes(block_size))
    return Pool(columns, num_bytes, max_num_seqs)
