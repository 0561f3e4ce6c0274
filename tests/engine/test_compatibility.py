# SPDX-License-Identifier: Apache-2.0
"""Walks the table of what compression cannot be combined with: every row is refused, clearly."""

import inspect
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import cached_property
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
from engine.harness import LLAMA
from vllm.config import CompilationConfig, CompilationMode, CUDAGraphMode
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform
from vllm.platforms.interface import DeviceCapability

import ems_vllm
from ems_vllm.config import ConfigError, load_config
from ems_vllm.engine.frontend.compatibility import RULES, check_compatibility
from ems_vllm.engine.kernels import covers
from ems_vllm.engine.worker.refusals import LAYER_REFUSALS
from ems_vllm.keys import CONFIG_KEY

CONFIG = load_config({"recipe": "ems"})


@pytest.fixture(scope="module")
def vllm_config():
    return EngineArgs(model=LLAMA).create_engine_config()


@contextmanager
def changed(vllm_config: Any, changes: dict[str, dict[str, Any]]) -> Iterator[None]:
    """Fields of a configuration, or of a section of it, set for the length of a `with`."""
    with ExitStack() as stack:
        for section, fields in changes.items():
            owner = getattr(vllm_config, section) if section else vllm_config
            for name, value in fields.items():
                stack.enter_context(set_to(owner, name, value))
        yield


def set_to(owner: Any, name: str, value: Any) -> AbstractContextManager[Any]:
    # What is derived from the model's files is a property, and has no setter.
    if isinstance(inspect.getattr_static(owner, name), property | cached_property):
        return mock.patch.object(type(owner), name, value)
    return mock.patch.object(owner, name, value)


def with_property(name: str, value: Any = True) -> dict[str, Any]:
    """A model configuration that has another nature than the tiny model's."""
    return {"model_config": {name: value}}


# What trips each rule, in the order of the table: section of the configuration, field, value.
TRIPS: list[tuple[str, dict[str, dict[str, Any]]]] = [
    ("model", with_property("use_mla")),
    ("model", with_property("is_encoder_decoder")),
    ("model", with_property("is_diffusion")),
    ("runner", with_property("runner_type", "pooling")),
    (
        "speculative_config",
        {"": {"speculative_config": SimpleNamespace(method="eagle3", num_speculative_tokens=3)}},
    ),
    (
        "kv_transfer_config",
        {"": {"kv_transfer_config": SimpleNamespace(kv_connector="OffloadingConnector")}},
    ),
    ("decode_context_parallel_size", {"parallel_config": {"decode_context_parallel_size": 2}}),
    ("prefill_context_parallel_size", {"parallel_config": {"prefill_context_parallel_size": 2}}),
    ("ubatch_size", {"parallel_config": {"ubatch_size": 4}}),
    ("scheduler_cls", {"scheduler_config": {"scheduler_cls": "mine.Scheduler"}}),
    ("kv_cache_dtype", {"cache_config": {"cache_dtype": "fp8_e5m2"}}),
    ("kv_cache_dtype", {"cache_config": {"cache_dtype": "bfloat16"}}),
    (
        "kv_cache_dtype_skip_layers",
        {"cache_config": {"cache_dtype": "fp8", "kv_cache_dtype_skip_layers": ["0"]}},
    ),
    ("kv_sharing_fast_prefill", {"cache_config": {"kv_sharing_fast_prefill": True}}),
    ("hisparse_config", {"attention_config": {"hisparse_config": "a HiSparseConfig"}}),
    # What vLLM makes of FULL_AND_PIECEWISE.
    (
        "compilation_config.pass_config.fuse_attn_quant",
        {
            "compilation_config": {
                "cudagraph_mode": CUDAGraphMode.FULL,
                "splitting_ops": [],
                "pass_config": SimpleNamespace(fuse_attn_quant=True),
            }
        },
    ),
    (
        "compilation_config.splitting_ops",
        {"compilation_config": {"cudagraph_mode": CUDAGraphMode.FULL, "splitting_ops": []}},
    ),
    (
        "compilation_config.cudagraph_mode",
        {
            "compilation_config": {
                "cudagraph_mode": CUDAGraphMode.FULL,
                "splitting_ops": ["vllm::unified_attention"],
            }
        },
    ),
    ("max_num_batched_tokens", {"scheduler_config": {"max_num_batched_tokens": 2}}),
    ("long_prefill_token_threshold", {"scheduler_config": {"long_prefill_token_threshold": 1}}),
    (
        "kv_compression_config.prefix_score_tokens",
        {
            "": {
                "additional_config": {
                    CONFIG_KEY: {"recipe": "ems", "prefix_score_tokens": 1000},
                }
            }
        },
    ),
    (
        "kv_compression_config.prefill_interval",
        {
            "": {"additional_config": {CONFIG_KEY: {"recipe": "ems", "prefill_interval": 512}}},
            **with_property("is_mm_prefix_lm"),
        },
    ),
    (
        "kv_compression_config.prefill_interval",
        {
            "": {"additional_config": {CONFIG_KEY: {"recipe": "ems", "prefill_interval": 512}}},
            "cache_config": {"block_size": 1},
        },
    ),
    (
        "kv_compression_config.inspect_requests",
        {"": {"additional_config": {CONFIG_KEY: {"recipe": "ems", "inspect_requests": 8}}}},
    ),
    ("worker_cls", {"parallel_config": {"worker_cls": "mine.Worker"}}),
    ("device", {"device_config": {"device_type": "cuda"}}),
    (
        "disable_hybrid_kv_cache_manager",
        {
            "": {"additional_config": {CONFIG_KEY: {"recipe": "ems", "allocator": "pyramid"}}},
            "scheduler_config": {"disable_hybrid_kv_cache_manager": True},
        },
    ),
    ("device", {"device_config": {"device_type": "cuda"}}),
]
# Architectures that the extension was built for, by index in TRIPS; the GPU is an 8.9.
BUILDS = {len(TRIPS) - 3: (), len(TRIPS) - 1: ("9.0a", "10.0")}


def test_every_rule_has_a_case():
    assert [key for key, _ in TRIPS] == [rule.key for rule in RULES]


@pytest.mark.parametrize(
    "index", range(len(TRIPS)), ids=[f"{i}-{t[0]}" for i, t in enumerate(TRIPS)]
)
def test_every_combination_is_refused_with_one_sentence(vllm_config, index, monkeypatch):
    key, changes = TRIPS[index]
    on_a_gpu(monkeypatch, BUILDS.get(index, ()))
    rule = RULES[index]
    with changed(vllm_config, changes), pytest.raises(ConfigError) as refusal:
        check_compatibility(vllm_config, CONFIG)
    (sentence,) = str(refusal.value).splitlines()
    assert sentence.startswith(f"{key}=")
    assert "kv_compression='ems'" in sentence
    assert rule.reason in sentence
    assert rule.remedy in sentence
    assert sentence.endswith("or set kv_compression to off.")


def on_a_gpu(monkeypatch: pytest.MonkeyPatch, archs: tuple[str, ...]) -> None:
    """A GPU of compute capability 8.9, and an extension built for `archs`."""
    info = {**ems_vllm.build_info(), "cuda_archs": archs}
    monkeypatch.setattr(ems_vllm, "build_info", lambda: info)
    monkeypatch.setattr(
        type(current_platform), "get_device_capability", lambda *args: DeviceCapability(8, 9)
    )


def test_a_gpu_with_kernels_is_not_refused(vllm_config, monkeypatch):
    on_a_gpu(monkeypatch, ("8.0", "9.0a"))
    with changed(vllm_config, {"device_config": {"device_type": "cuda"}}):
        check_compatibility(vllm_config, CONFIG)


@pytest.mark.parametrize(
    ("arch", "capabilities"),
    [
        ("8.0", [(8, 0), (8, 6), (8, 9)]),
        ("8.6", [(8, 6), (8, 9)]),
        ("8.0+PTX", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)]),
        ("9.0", [(9, 0)]),
        ("9.0a", [(9, 0)]),
        ("9.0a+PTX", [(9, 0)]),
        ("10.0f", [(10, 0)]),
        ("12.0", [(12, 0)]),
    ],
)
def test_architectures_cover_gpus_as_cuda_promises(arch, capabilities):
    gpus = [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)]
    assert [gpu for gpu in gpus if covers(arch, *gpu)] == capabilities


@pytest.mark.parametrize(
    ("mode", "settings", "key"),
    [
        ("FULL_AND_PIECEWISE", {"splitting_ops": []}, "splitting_ops=[]"),
        (
            "FULL_AND_PIECEWISE",
            {"pass_config": {"fuse_attn_quant": True}},
            "pass_config.fuse_attn_quant=True",
        ),
        ("FULL", {}, "cudagraph_mode='FULL'"),
        ("FULL_AND_PIECEWISE", {}, None),
        ("FULL_DECODE_ONLY", {"splitting_ops": []}, None),
    ],
)
def test_full_graphs_name_what_led_to_them(vllm_config, mode, settings, key):
    """vLLM itself turns the mode into another."""
    compilation = CompilationConfig(
        mode=CompilationMode.VLLM_COMPILE, cudagraph_mode=mode, custom_ops=["none"], **settings
    )
    compilation.set_splitting_ops_for_v1(all2all_backend="naive")
    with changed(vllm_config, {"": {"compilation_config": compilation}}):
        if key is None:
            check_compatibility(vllm_config, CONFIG)
            return
        with pytest.raises(ConfigError) as refusal:
            check_compatibility(vllm_config, CONFIG)
    assert str(refusal.value).startswith(f"compilation_config.{key} cannot be combined")


def test_nothing_else_is_refused(vllm_config):
    check_compatibility(vllm_config, CONFIG)
    fine = {
        "": {"speculative_config": SimpleNamespace(method="ngram", num_speculative_tokens=3)},
        "compilation_config": {"cudagraph_mode": CUDAGraphMode.FULL_AND_PIECEWISE},
        "cache_config": {"cache_dtype": "fp8", "enable_prefix_caching": True},
        "parallel_config": {"tensor_parallel_size": 2, "pipeline_parallel_size": 2},
        "scheduler_config": {"async_scheduling": True},
    }
    with changed(vllm_config, fine):
        check_compatibility(vllm_config, CONFIG)


@pytest.mark.parametrize(
    ("allocator", "is_disabled"), [("uniform", True), ("pyramid", False), ("pyramid", None)]
)
def test_one_manager_for_all_layers_is_fine_where_they_share_equally(
    vllm_config, allocator, is_disabled
):
    settings = {"recipe": "ems", "allocator": allocator}
    changes = {
        "": {"additional_config": {CONFIG_KEY: settings}},
        "scheduler_config": {"disable_hybrid_kv_cache_manager": is_disabled},
    }
    with changed(vllm_config, changes):
        check_compatibility(vllm_config, load_config(settings))


def test_a_profile_of_another_model_is_refused(vllm_config):
    profile = {"ratios": [0.5], "fractions": {layer: [0.5] for layer in range(30)}}
    config = load_config({"recipe": "ems", "allocator": {"name": "profile", "profile": profile}})
    with pytest.raises(ConfigError) as refusal:
        check_compatibility(vllm_config, config)
    assert str(refusal.value) == (
        "kv_compression_config.allocator='profile' is not allowed: its profile has a layer 29, but "
        "the model has 4 layers, counted from 0; give a profile of this model, or measure one with "
        "`ems-vllm calibrate`."
    )


def test_refusals_of_layers_name_key_value_and_remedy():
    details = {
        "layers": "2 layers: sliding window",
        "native": 16,
        "known": "A",
        "scales": [1.0],
        "name": "layers.0",
        "dtype": "float16",
        "heads": [4, 8],
        "choice": "one of them",
        "reason": "a share to layers.0",
    }
    for refusal in LAYER_REFUSALS:
        sentence = str(refusal.error("VALUE", "ems", **details))
        assert sentence.startswith(f"{refusal.key}='VALUE' cannot be combined with")
        assert "{" not in sentence
        assert sentence.endswith("or set kv_compression to off.")


def test_roles_are_refused_where_no_template_shows_them(vllm_config):
    config = load_config({"recipe": "ems", "protect": ["system"]})
    check_compatibility(vllm_config, config)
    with (
        mock.patch.object(vllm_config.model_config.hf_config, "model_type", "gpt_oss"),
        pytest.raises(ConfigError, match=r"protect=\['system'\] cannot be combined .*gpt-oss"),
    ):
        check_compatibility(vllm_config, config)
