# SPDX-License-Identifier: Apache-2.0
"""What the host tells a GPU in every step."""

import numpy as np
import pytest
import torch
from nullgpu.trace import listening

from ems_vllm.engine.group.to_device import pad_rows, to_device

GPU = torch.device("cuda")


@pytest.mark.parametrize("values", [[1, 2, 3], np.array([1, 2, 3], np.int64), []])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_numbers_reach_a_gpu_and_nothing_waits(values, dtype):
    to_device([0] * 3, GPU, dtype)
    with listening() as events:
        found = to_device(values, GPU, dtype)
    assert {(event.kind, event.name) for event in events if event.kind != "free"} <= {
        ("copy", "pinned to device")
    }
    assert found.dtype == dtype
    assert found.tolist() == list(values)


def test_rows_of_different_lengths_reach_a_gpu():
    assert pad_rows([[1], [2, 3], []], GPU).tolist() == [[1, 0], [2, 3], [0, 0]]
