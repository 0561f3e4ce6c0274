# SPDX-License-Identifier: Apache-2.0
"""Functions that compression relies on: read in the installed vLLM, refused when they differ."""

import dataclasses
import functools
import importlib

import pytest
from engine.harness import LLAMA
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.sched.scheduler import Scheduler

from ems_vllm.config import ConfigError
from ems_vllm.patches.contracts import CONTRACTS
from ems_vllm.patches.record import PatchError
from ems_vllm.patches.target import function_of, resolve, source_sha256

COMPRESSED = {"kv_compression": {"recipe": "ems"}}


@pytest.mark.parametrize("contract", CONTRACTS, ids=lambda contract: contract.target)
def test_installed_vllm_is_the_one_that_was_read(contract):
    from vllm import __version__

    assert contract.source_sha256[__version__.split("+")[0]] == contract.current_sha256()
    contract.verify()
    # What is read from the file is what Python would run.
    importlib.import_module(contract.target.partition(":")[0])
    function = function_of(*resolve(contract.target))
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    assert source_sha256(contract.target, function) == contract.current_sha256()
    contract.verify()


@pytest.mark.parametrize("contract", CONTRACTS, ids=lambda contract: contract.target)
def test_another_source_is_refused(contract):
    changed = dataclasses.replace(contract, source_sha256={"0.32.1": "0" * 64})
    with pytest.raises(PatchError, match="is not the code that was tested"):
        changed.verify()


@pytest.mark.parametrize(
    "target", ["vllm.v1.worker.gone:f", "vllm.v1.core.sched.scheduler:Scheduler.gone"]
)
def test_a_function_that_is_gone_is_refused(target):
    with pytest.raises(PatchError, match="install a vLLM version that ems-vllm supports"):
        dataclasses.replace(CONTRACTS[0], target=target).verify()


def test_a_change_by_another_extension_refuses_compression_and_nothing_else(monkeypatch):
    @functools.wraps(Scheduler.schedule)
    def schedule(self):
        return None

    for owner, name, other in (
        (Scheduler, "schedule", schedule),
        (KVCacheManager, "allocate_slots", lambda self, request: None),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, other)
            with pytest.raises(ConfigError, match=rf"{owner.__name__}\.{name} .* VLLM_PLUGINS"):
                EngineArgs(LLAMA, additional_config=COMPRESSED).create_engine_config()
            EngineArgs(LLAMA).create_engine_config()
    EngineArgs(LLAMA, additional_config=COMPRESSED).create_engine_config()
