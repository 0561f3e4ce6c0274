# SPDX-License-Identifier: Apache-2.0
"""LoRA on the CPU: requests of the base model keep its weights beside requests with adapters."""

from __future__ import annotations

from typing import Any

import torch
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU


class TorchCPUPunicaWrapper(PunicaWrapperCPU):
    """vLLM's PyTorch operators, which take "no adapter", index -1, for the last adapter."""

    def _apply_shrink(self, y: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        super()._apply_shrink(y, *args, **kwargs)
        y.view(-1, y.shape[-1])[self._is_base] = 0

    def _expand_prefill(self, y: torch.Tensor, x: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        super()._expand_prefill(y, self._without_base(x), *args, **kwargs)

    def _expand_decode(self, y: torch.Tensor, x: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        super()._expand_decode(y, self._without_base(x), *args, **kwargs)

    @property
    def _is_base(self) -> torch.Tensor:
        return self.token_lora_indices == -1

    def _without_base(self, x: torch.Tensor) -> torch.Tensor:
        return x.masked_fill(self._is_base.unsqueeze(-1), 0)
