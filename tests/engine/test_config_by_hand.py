# SPDX-License-Identifier: Apache-2.0
"""A VllmConfig that EngineArgs did not make is refused rather than served uncompressed."""

from types import SimpleNamespace

import pytest
from engine.harness import LLAMA
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.executor.abstract import Executor

from ems_vllm.config import ConfigError


class Started(Exception):
    """The executor got as far as to its workers."""


class NoWorkers(Executor):
    """An executor that has none."""

    def _init_executor(self) -> None:
        raise Started

    def collective_rpc(self, *args, **kwargs): ...

    def check_health(self) -> None: ...


def config_of(**settings):
    return EngineArgs(LLAMA, **settings).create_engine_config()


def test_settings_that_nobody_acted_upon_are_refused():
    config = config_of()
    config.additional_config = {"kv_compression": {"recipe": "ems"}}
    with pytest.raises(ConfigError, match=r"recipe='ems' has no effect .*by hand: build"):
        NoWorkers(config)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"additional_config": {"of_others": 1}},
        {"additional_config": {"kv_compression": "off"}},
        {"additional_config": {"kv_compression": {"recipe": "ems"}}},
    ],
    ids=["none", "of others", "off", "compressed"],
)
def test_configurations_of_engine_args_pass(settings):
    with pytest.raises(Started):
        NoWorkers(config_of(**settings))


def test_a_configuration_by_hand_that_says_off_passes():
    config = config_of()
    config.additional_config = {"kv_compression": {"recipe": "off"}}
    with pytest.raises(Started):
        NoWorkers(config)


def test_hashable_objects_of_others_are_left_alone():
    config = config_of()
    config.additional_config = SimpleNamespace(compute_hash=lambda: "")
    with pytest.raises(Started):
        NoWorkers(config)
