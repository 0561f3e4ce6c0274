# SPDX-License-Identifier: Apache-2.0
"""Shared set-up: test helpers are importable from the tests' root, `gpu` tests skip elsewhere."""

import os
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

os.environ.setdefault("OMP_NUM_THREADS", "1")
# vLLM's CPU worker uses all cores whatever that says, and threads that spin for each other take the
# cores from the tests of another worker: up to three times the time.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# No test downloads a model; one about a name that does not exist would ask for it five times.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent))


# Speed belongs to benchmarks/: a busy machine must not fail a property test. The examples are the
# same in every run, so that a commit is either green or not; `make soak` looks for new ones.
settings.register_profile(
    "ems", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("ems")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch

    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
