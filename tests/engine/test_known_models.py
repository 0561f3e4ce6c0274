# SPDX-License-Identifier: Apache-2.0
"""Well-known models: which layers are compressed, why the rest is not, or why one is refused."""

import json

import pytest
from engine import known_models

import ems_vllm
from ems_vllm.config import ConfigError, load_config
from ems_vllm.engine.kv_cache_spec import CompressedAttentionSpec
from ems_vllm.engine.worker.layer_choice import mixed_layer

pytestmark = pytest.mark.slow

DOCUMENTED = json.loads(known_models.OUTCOMES.read_text())


@pytest.fixture(scope="module", autouse=True)
def process_groups():
    with known_models.process_groups():
        yield


def test_every_configuration_is_documented():
    assert list(DOCUMENTED) == known_models.names()


@pytest.mark.parametrize("name", known_models.names())
def test_the_documented_outcome_is_what_happens(name):
    found = known_models.outcomes(name)
    if not ems_vllm.build_info()["cuda_archs"]:
        # Without CUDA kernels there are no head sizes to choose by.
        found["cuda"] = DOCUMENTED[name]["cuda"]
    assert found == DOCUMENTED[name], "run `python tests/engine/known_models.py`"


@pytest.mark.parametrize("name", ["phi-3-mini-128k", "phi-4-mini"])
def test_a_window_longer_than_any_request_can_be_lifted(name):
    model = known_models.build(name, without_window=True)
    assert known_models.outcome(model, "cpu", "ems") == "all 32 layers"
    if ems_vllm.build_info()["cuda_archs"]:
        assert known_models.outcome(model, "cuda", "ems") == "all 32 layers"


@pytest.mark.parametrize("name", known_models.names())
def test_vllm_gives_compressed_layers_groups_of_their_own(name):
    from engine.vllm_imports import get_kv_cache_configs

    model = known_models.build(name)
    try:
        choice = known_models.choose(model, "cpu", "ems")
    except ConfigError:
        return
    plan_settings = load_config({"recipe": "ems"}).plan_settings
    specs = {
        key: CompressedAttentionSpec.compress(spec, plan_settings, 64)
        if key in choice.compressed
        else spec
        for key, spec in model.specs.items()
    }
    model.vllm_config.cache_config.kv_cache_layout = "LBNHC"
    (config,) = get_kv_cache_configs(model.vllm_config, [dict(specs)], [1 << 40])
    assert mixed_layer(config, specs) is None
    grouped = [
        key
        for group in config.kv_cache_groups
        if isinstance(group.kv_cache_spec, CompressedAttentionSpec)
        for key in group.layer_names
    ]
    assert sorted(grouped) == sorted(choice.compressed)
