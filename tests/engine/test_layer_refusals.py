# SPDX-License-Identifier: Apache-2.0
"""What a worker refuses once it knows its layers, and what the start-up log says of the others."""

from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from engine.harness import LLAMA, engine
from engine.vllm_imports import get_kv_cache_configs
from safetensors.torch import load_file
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec
from vllm.v1.worker.gpu_worker import Worker

from ems_vllm.config import ConfigError, load_config
from ems_vllm.engine.group.output_projection import output_weights
from ems_vllm.engine.kv_cache_spec import CompressedAttentionSpec
from ems_vllm.engine.observation import ObservationSettings
from ems_vllm.engine.worker import group_builder
from ems_vllm.engine.worker.layer_settings import LayersDiffer, by_layer
from ems_vllm.engine.worker.start_log import log_start
from ems_vllm.policies.policy import Policy

CONFIG = load_config({"recipe": "ems", "budget": 64})


@pytest.fixture(scope="module")
def worker():
    with engine({"recipe": "ems", "budget": 64}) as probe:
        yield probe.worker


def build_group(worker):
    """The group of the running model, built again."""
    (group,) = worker.compression.groups
    return worker._group_builder().group(0, group.tensors.spec, group.layer_names, None)


class TestQueryHeads:
    @pytest.fixture(autouse=True)
    def another_number(self, worker, monkeypatch):
        layer = list(worker._attention_layers().values())[-1]
        monkeypatch.setattr(layer, "num_heads", 2 * layer.num_heads)

    def test_different_numbers_are_refused_where_queries_are_recorded(self, worker):
        with pytest.raises(ConfigError, match=r"different numbers of query heads \(\[\d+, \d+\]\)"):
            build_group(worker)

    def test_they_do_not_matter_where_none_are_recorded(self, worker, monkeypatch):
        recipe = load_config({"recipe": "knorm", "budget": 64})
        monkeypatch.setattr(worker, "_policy", Policy.from_config(recipe))
        assert build_group(worker).tensors.query_ring is None


def test_output_projections_are_those_of_the_model(worker):
    """Also where vLLM has packed them for a CPU."""
    layers = list(worker._attention_layers().values())
    found = output_weights(worker.get_model(), layers)
    stored = load_file(Path(LLAMA) / "model.safetensors")
    for index, weight in enumerate(found):
        expected = stored[f"model.layers.{index}.self_attn.o_proj.weight"]
        torch.testing.assert_close(weight, expected.to(weight.dtype), rtol=1e-5, atol=1e-6)


def test_a_layer_without_an_output_projection_is_refused(worker, monkeypatch):
    recipe = load_config({"recipe": "criticalkv", "budget": 64})
    monkeypatch.setattr(worker, "_policy", Policy.from_config(recipe))
    monkeypatch.setattr(group_builder, "output_weights", lambda model, layers: [None] * len(layers))
    message = (
        r"selector='critical' .*model\.layers\.0\S* has no output projection whose weights can be "
        "read; choose another selector"
    )
    with pytest.raises(ConfigError, match=message):
        build_group(worker)


def test_a_profile_of_another_models_heads_is_refused(worker, monkeypatch):
    recipe = load_config({"recipe": "compresskv", "budget": 64})
    monkeypatch.setattr(worker, "_policy", Policy.from_config(recipe))
    message = (
        r"scorer='compresskv' .*its profile is of another model: it has 9 query heads in layer 0, "
        "not 8; measure this one with `ems-vllm calibrate`"
    )
    with pytest.raises(ConfigError, match=message):
        build_group(worker)


@pytest.mark.parametrize(
    ("backend", "remedy"),
    [
        ("TRITON_FLASH_ATTN", "choose TRITON_ATTN with --attention-backend"),
        ("TRITON_FLASHINFER", "choose TRITON_ATTN with --attention-backend"),
        ("ROCM_ATTN", "choose one of them with --attention-backend"),
    ],
)
def test_backends_that_cannot_be_observed(worker, monkeypatch, backend, remedy):
    layer = next(iter(worker._attention_layers().values()))
    monkeypatch.setattr(layer, "impl", SimpleNamespace())
    monkeypatch.setattr(layer, "attn_backend", SimpleNamespace(get_name=lambda: backend))
    with pytest.raises(ConfigError, match=f"attention_backend='{backend}' .*{remedy}"):
        build_group(worker)


class TestShares:
    """An allocator deals to exactly the layers that are compressed."""

    NAMES = tuple(f"model.layers.{index}.self_attn.attn" for index in range(4))

    @staticmethod
    def settings(num_layers):
        config = load_config({"recipe": "ems", "budget": 64, "allocator": "pyramid"})
        return config.plan_settings_of(num_layers)

    def test_each_layer_has_the_settings_of_its_level(self):
        settings = self.settings(4)
        found = by_layer(settings, self.NAMES, set(self.NAMES))
        assert [found[name].level for name in self.NAMES] == [0, 1, 2, 2]
        # A stage of a pipeline has some of them.
        assert by_layer(settings, self.NAMES[2:], set(self.NAMES[2:])).keys() == {*self.NAMES[2:]}

    def test_without_shares_all_are_alike_whatever_else_there_is(self):
        found = by_layer(CONFIG.plan_settings_of(4), self.NAMES, set(self.NAMES[:2]))
        assert found == dict.fromkeys(self.NAMES[:2], CONFIG.plan_settings)

    @pytest.mark.parametrize(
        ("num_layers", "num_compressed", "message"),
        [
            (4, 3, "a share to model.layers.3.self_attn.attn, which is not compressed"),
            (3, 4, "nothing to model.layers.3.self_attn.attn, which is compressed"),
        ],
    )
    def test_others_are_refused(self, num_layers, num_compressed, message):
        with pytest.raises(LayersDiffer, match=message):
            by_layer(self.settings(num_layers), self.NAMES, set(self.NAMES[:num_compressed]))


def spec(cls=FullAttentionSpec, **fields):
    plain = {"block_size": 16, "num_kv_heads": 2, "head_size": 32, "dtype": torch.float32}
    return cls(**plain, **fields)


def compressed():
    observation = ObservationSettings(obs_window=16, score_tokens=8192, ring_rows=None)
    return spec(CompressedAttentionSpec, settings=CONFIG.plan_settings, observation=observation)


def configs_of_stages(*stages):
    """What vLLM makes of the specs of a pipeline's stages."""
    vllm_config = EngineArgs(LLAMA, block_size=16).create_engine_config()
    vllm_config.cache_config.kv_cache_layout = "LBNHC"
    return get_kv_cache_configs(vllm_config, list(stages), [64 << 20] * len(stages))


class TestPipeline:
    """A stage without a layer to compress: whether that is wrong depends on the other stages."""

    @pytest.fixture(autouse=True)
    def a_stage_that_keeps_all(self, worker, monkeypatch):
        names = ("model.layers.0.self_attn.attn", "model.layers.1.self_attn.attn")
        specs = {name: spec(SlidingWindowSpec, sliding_window=64) for name in names}
        monkeypatch.setattr(Worker, "get_kv_cache_spec", lambda worker: dict(specs))
        monkeypatch.setattr(Worker, "initialize_from_config", lambda worker, config: None)
        monkeypatch.setattr(worker.parallel_config, "pipeline_parallel_size", 2)
        monkeypatch.setattr(worker, "compression", worker.compression)

    def test_it_starts_where_another_stage_has_one(self, worker):
        config, _ = configs_of_stages(worker.get_kv_cache_spec(), {"model.layers.2": compressed()})
        worker.initialize_from_config(config)
        assert worker.compression.groups == []

    def test_it_is_refused_where_none_has(self, worker):
        for config in configs_of_stages(worker.get_kv_cache_spec(), {"model.layers.2": spec()}):
            with pytest.raises(ConfigError, match=r"no layer .* \(2 layers: SlidingWindow has"):
                worker.initialize_from_config(config)


def test_the_log_gives_the_reasons_that_only_layers_know():
    (config,) = configs_of_stages({"capped": spec()})
    capped = SimpleNamespace(
        impl=SimpleNamespace(logits_soft_cap=50.0), dtype=torch.float32, kv_cache_dtype="auto"
    )
    lines = start_lines(config, CONFIG, {"capped": capped})
    assert any(
        "0 of 1 layers compressed; left alone: 1 layer: soft-capped" in line for line in lines
    )
    assert not any("equal budgets" in line for line in lines)


def test_the_log_says_that_budgets_are_equal():
    (config,) = configs_of_stages({"model.layers.0": compressed()})
    assert any("equal budgets" in line for line in start_lines(config, CONFIG, {}))
    dealt = load_config({"recipe": "ems", "budget": 64, "allocator": "ada"})
    assert not any("equal budgets" in line for line in start_lines(config, dealt, {}))


def start_lines(kv_cache_config, config, layers):
    """What a server says at start-up."""
    logger = mock.Mock()
    sizes = mock.Mock(workspace_bytes=0)
    sizes.score_bytes.return_value = sizes.ring_bytes.return_value = 0
    sizes.head_bytes.return_value = 0
    log_start(logger, config, kv_cache_config, layers, 512, sizes)
    return [call.args[0] % call.args[1:] for call in logger.info.call_args_list]
