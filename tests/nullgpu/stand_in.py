# SPDX-License-Identifier: Apache-2.0
"""What the host needs to hear from kernels, which here compute nothing.

Model Runner V2 learns from a kernel how many tokens each request was given: one, if its prompt was
done in this step. Tokens themselves may be anything. Runner V1 knows without asking.

A fill is a kernel of torch; the null GPU makes copies.
"""

import ctypes
from typing import Any
from unittest import mock

import numpy as np
import torch


def install() -> None:
    """Let Model Runner V2 hear of one token for every request whose prompt is done."""
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    sample = GPUModelRunner.sample

    def sampled(self: Any, hidden_states: Any, input_batch: Any, *args: Any, **kwargs: Any) -> Any:
        output, num_sampled, num_rejected = sample(
            self, hidden_states, input_batch, *args, **kwargs
        )
        rows = len(num_sampled)
        done = input_batch.num_computed_tokens_np + input_batch.num_scheduled_tokens
        is_done = done[:rows] >= input_batch.prefill_len_np[:rows]
        dtype = np.int32 if num_sampled.element_size() == 4 else np.int64
        values = np.ascontiguousarray(is_done, dtype=dtype)
        ctypes.memmove(num_sampled.data_ptr(), values.ctypes.data, values.nbytes)
        return output, num_sampled, num_rejected

    GPUModelRunner.sample = sampled


def fills() -> Any:
    """Within this context, tensors are filled."""

    def fill(tensor: torch.Tensor, value: Any) -> torch.Tensor:
        return tensor.copy_(torch.full(tensor.shape, value, dtype=tensor.dtype))

    return mock.patch.object(torch.Tensor, "fill_", fill)
