# SPDX-License-Identifier: Apache-2.0
"""What the size of a KV cache depends on, from a model's config.json."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ems_vllm.config.errors import ConfigError

_DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class CacheShape:
    """Layers, heads and element size of a cache; keys and values have the same."""

    num_layers: int
    num_kv_heads: int
    head_size: int
    itemsize: int

    @classmethod
    def read(cls, path: Path) -> CacheShape:
        """From a model's folder or its config.json.

        Raises:
            ConfigError: the file is missing or describes no such cache.
        """
        file = path / "config.json" if path.is_dir() else path
        try:
            data: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            data = data.get("text_config", data)
            num_heads = int(data["num_attention_heads"])
            return cls(
                num_layers=int(data["num_hidden_layers"]),
                num_kv_heads=int(data.get("num_key_value_heads") or num_heads),
                head_size=int(data.get("head_dim") or data["hidden_size"] // num_heads),
                itemsize=_DTYPE_BYTES[
                    str(data.get("dtype") or data.get("torch_dtype") or "bfloat16")
                ],
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
