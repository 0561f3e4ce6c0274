# SPDX-License-Identifier: Apache-2.0
"""Layers, heads and element size of a KV cache: its size, from a model's config.json."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ems_vllm.config.errors import ConfigError

_DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "fp8": 1}
# The kind of layer that is compressed, in config.json's `layer_types`.
_FULL = "full_attention"


@dataclass(frozen=True)
class CacheShape:
    """Layers, heads and element size of a cache; keys and values have the same.

    Attributes:
        num_layers: All layers of the model.
        itemsize: Bytes of an element.
        other_layers: Kinds of layers beside full attention, as config.json names them.
    """

    num_layers: int
    num_kv_heads: int
    head_size: int
    itemsize: int
    other_layers: tuple[str, ...] = ()

    @classmethod
    def of(cls, num_layers: int, num_kv_heads: int, head_size: int, dtype: str) -> CacheShape:
        """From numbers, for a model of which no file is at hand.

        Raises:
            ConfigError: no cache has this dtype.
        """
        return cls(num_layers, num_kv_heads, head_size, _itemsize(dtype))

    @classmethod
    def read(cls, path: Path, dtype: str | None = None) -> CacheShape:
        """From a model's folder or its config.json.

        Args:
            dtype: Of the cache; None: the model's.

        Raises:
            ConfigError: the file is missing or describes no such cache, or none has this dtype.
        """
        given = None if dtype is None else _itemsize(dtype)
        file = path / "config.json" if path.is_dir() else path
        try:
            data: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            data = data.get("text_config", data)
            num_heads = int(data["num_attention_heads"])
            return cls(
                num_layers=int(data["num_hidden_layers"]),
                num_kv_heads=int(data.get("num_key_value_heads") or num_heads),
                head_size=int(data.get("head_dim") or data["hidden_size"] // num_heads),
                itemsize=given
                or _DTYPE_BYTES[str(data.get("dtype") or data.get("torch_dtype") or "bfloat16")],
                other_layers=_other_layers(data),
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"model={str(path)!r} gives no cache shape ({type(error).__name__}: {error}): name "
                "a folder with a config.json of a decoder-only model."
            ) from None

    def column_bytes(self, block_size: int) -> int:
        """Bytes of one block-table column over all layers, keys and values."""
        per_token = 2 * self.num_layers * self.num_kv_heads * self.head_size * self.itemsize
        return per_token * block_size


def _other_layers(data: dict[str, Any]) -> tuple[str, ...]:
    """Kinds of layers that are not full attention, in a model's configuration."""
    kinds = data.get("layer_types")
    if kinds:
        return tuple(sorted({*kinds} - {_FULL}))
    # Without a list the window is every layer's.
    slides = data.get("sliding_window") and data.get("use_sliding_window", True)
    return ("sliding_attention",) if slides else ()


def _itemsize(dtype: str) -> int:
    if dtype not in _DTYPE_BYTES:
        raise ConfigError(
            f"dtype={dtype!r} is not allowed: give one of {', '.join(sorted(_DTYPE_BYTES))}."
        )
    return _DTYPE_BYTES[dtype]
