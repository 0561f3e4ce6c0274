# SPDX-License-Identifier: Apache-2.0
"""What the compiled operators have kernels for; the tables are those that they dispatch by."""

from __future__ import annotations

import ems_vllm


def dtype_pairs(device: str) -> tuple[tuple[str, str], ...]:
    """(dtype of queries, dtype of the cache) that are scored together on a device.

    Args:
        device: "cuda" or "cpu".
    Returns:
        torch's names of dtypes; empty for a device that this build has no kernels for.
    """
    pairs: tuple[tuple[str, str], ...] = ems_vllm.build_info()[f"{device}_dtypes"]
    return pairs


def without_head_size(device: str, head_size: int) -> str | None:
    """Why layers of a head size cannot be compressed on a device; None where they can.

    Kernels for a GPU are compiled for some sizes. Those of the CPU take any.
    """
    if device != "cuda":
        return None
    sizes = ems_vllm.build_info()["cuda_head_sizes"]
    if head_size in sizes:
        return None
    known = ", ".join(map(str, sizes))
    return f"head_size {head_size}, for which there is no CUDA kernel (there are for {known})"


def without_cache_dtype(device: str, cache_dtype: str) -> str | None:
    """Why a cache of a dtype cannot be compressed on a device; None where it can.

    Every dtype that a key cache may have where it is scored is one that can be merged, and the
    other way round.

    Args:
        device: "cuda" or "cpu".
        cache_dtype: torch's name of it.
    """
    known = dict.fromkeys(cache for _, cache in dtype_pairs(device))
    if cache_dtype in known:
        return None
    return f"a {cache_dtype} cache, which no kernel reads (they read {', '.join(known)})"


def without_dtypes(device: str, query_dtype: str, cache_dtype: str) -> str | None:
    """Why queries cannot be scored with a cache on a device; None where they can.

    Args:
        device: "cuda" or "cpu".
        query_dtype, cache_dtype: torch's names of them.
    """
    pairs = dtype_pairs(device)
    if (query_dtype, cache_dtype) in pairs:
        return None
    known = " or ".join(cache for query, cache in pairs if query == query_dtype) or "none"
    return (
        f"{query_dtype} queries with a {cache_dtype} cache, for which there is no kernel on "
        f"{device} (caches that go with them: {known})"
    )


def covers(arch: str, major: int, minor: int) -> bool:
    """Whether kernels for an architecture run on a GPU.

    Args:
        arch: In torch's notation: 9.0a is for 9.0 alone, 10.0f and 8.0 also for later GPUs of the
            same major version, and 9.0+PTX for all later ones.
        major, minor: Compute capability of the GPU.
    """
    number, _, ptx = arch.partition("+")
    built = tuple(int(part) for part in number.rstrip("af").split("."))
    if number.endswith("a"):
        return built == (major, minor)
    if ptx and not number.endswith("f"):
        return built <= (major, minor)
    return built[0] == major and built[1] <= minor
