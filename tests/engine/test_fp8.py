# SPDX-License-Identifier: Apache-2.0
"""Float8 caches: as dense ones where nothing is dropped, and the same answers at every scale."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args
from unittest import mock

import pytest
import torch
from engine.harness import LLAMA, QWEN3, engine, tokens
from safetensors.torch import load_file, save_file

from ems_vllm.config import ConfigError
from ems_vllm.engine.cache_dtype import FLOAT8_CACHES

pytestmark = pytest.mark.slow

PROMPTS = [tokens(length, seed=length) for length in (420, 30, 250)]
MAX_TOKENS = 48
RECIPES = ("ems", "snapkv", "h2o", "knorm")


def settings(recipe: str, budget: int = 64) -> dict[str, Any]:
    return {
        "recipe": recipe,
        "budget": budget,
        "recent_window": 32,
        "recompress_interval": 16,
        "min_blocks_saved": 1,
    }


@dataclass(frozen=True)
class Scales:
    """Scales of every layer; those of one layer repeat where there are more layers."""

    key: Sequence[float] = (1.0,)
    value: Sequence[float] = (1.0,)
    query: Sequence[float] = (1.0,)


ONES = Scales()
# Powers of two: what is stored has the same mantissas, so nothing is rounded in another way.
POWERS = Scales(key=(0.125, 4.0, 0.03125, 0.5), value=(0.25, 2.0, 0.0625, 4.0))
QUERY_POWERS = Scales(key=POWERS.key, value=POWERS.value, query=(0.25, 0.125, 2.0, 0.0625))


@contextmanager
def scaled(scales: Scales, float8_queries: bool = False, exact: bool = True) -> Iterator[None]:
    """Gives every attention layer scales.

    Args:
        scales: Of the layers.
        float8_queries: Whether vLLM quantises queries, as it does for FlashAttention 3.
        exact: Whether keys, values and queries are first made such that float8 holds them at each
            of the scales above.
    """
    from vllm.model_executor.layers.attention import Attention
    from vllm.model_executor.layers.quantization.input_quant_fp8 import QuantFP8

    from ems_vllm.cpu_platform.attention import TorchCPUImpl

    load, write = Attention.process_weights_after_loading, TorchCPUImpl.do_kv_cache_update
    attend, quantise = TorchCPUImpl.forward, QuantFP8.forward_native

    def load_scales(layer: Any, *args: Any) -> None:
        load(layer, *args)
        index = int(layer.layer_name.split(".")[2])
        for name in ("key", "value", "query"):
            values = getattr(scales, name)
            scale = values[index % len(values)]
            getattr(layer, f"_{name[0]}_scale").fill_(scale)
            setattr(layer, f"_{name[0]}_scale_float", scale)

    def write_rounded(
        impl: Any, layer: Any, key: torch.Tensor, value: torch.Tensor, *args: Any
    ) -> None:
        if exact:
            key, value = rounded(key), rounded(value)
        write(impl, layer, key, value, *args)

    def quantise_rounded(quant: Any, x: torch.Tensor, scale: torch.Tensor, **kwargs: Any) -> Any:
        return quantise(quant, rounded(x), scale, **kwargs)

    def attend_scaled_back(
        impl: Any, layer: Any, query: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        assert query.dtype == torch.float8_e4m3fn
        return attend(impl, layer, query.float() * layer._q_scale, *args, **kwargs)

    patches: list[tuple[type[Any], str, Callable[..., Any] | bool]] = [
        (Attention, "process_weights_after_loading", load_scales),
        (TorchCPUImpl, "do_kv_cache_update", write_rounded),
    ]
    if float8_queries:
        patches += [
            (TorchCPUImpl, "supports_quant_query_input", True),
            (TorchCPUImpl, "forward", attend_scaled_back),
            (QuantFP8, "forward_native", quantise_rounded),
        ]
    with ExitStack() as stack:
        for owner, name, new in patches:
            stack.enter_context(mock.patch.object(owner, name, new))
        yield


def rounded(x: torch.Tensor) -> torch.Tensor:
    """x in float8, without what is too large or subnormal at some scale."""
    x = x.clamp(-8.0, 8.0).to(torch.float8_e4m3fn).to(x.dtype)
    return torch.where(x.abs() < 2**-4, 0.0, x)


def answers(compression: dict[str, Any] | None, model: str = LLAMA) -> list[list[int]]:
    with engine(compression, model, kv_cache_dtype="fp8") as probe:
        found = probe.generate(PROMPTS, MAX_TOKENS)
        if compression is not None:
            compacted = probe.stats()["num_compactions"] > 0
            assert compacted == (compression["budget"] < max(map(len, PROMPTS)))
        probe.assert_pool_is_empty()
    return found


@pytest.fixture(scope="module")
def at_scale_one() -> dict[str, list[list[int]]]:
    """Answers by recipe; "dense" without compression."""
    with scaled(ONES):
        found = {recipe: answers(settings(recipe)) for recipe in RECIPES}
        return {**found, "dense": answers(None)}


@pytest.mark.parametrize("model", [LLAMA, QWEN3], ids=["llama", "qwen3"])
def test_budget_beyond_the_length_answers_as_vllm_alone(model):
    assert answers(settings("ems", budget=8192), model) == answers(None, model)


@pytest.mark.parametrize("recipe", RECIPES)
def test_scales_change_nothing(at_scale_one, recipe):
    with scaled(POWERS):
        assert answers(settings(recipe)) == at_scale_one[recipe]


def test_dense_answers_do_not_depend_on_the_scales_either(at_scale_one):
    """The platform's own part of it."""
    with scaled(POWERS):
        assert answers(None) == at_scale_one["dense"]


def test_recipes_differ(at_scale_one):
    """The control of the tests above: which entries stay shows in the answers."""
    first = [tuple(found[0]) for found in at_scale_one.values()]
    assert len(set(first)) == len(first)


def test_layers_that_take_turns_keep_their_scales():
    """1 MiB holds the scores of this prompt for two of the four layers."""
    found = []
    for scales in (ONES, POWERS):
        compression = {**settings("snapkv"), "workspace_mib": 1}
        with scaled(scales), engine(compression, kv_cache_dtype="fp8") as probe:
            found += probe.generate([tokens(3000)], MAX_TOKENS)
    assert found[0] == found[1]


@pytest.mark.parametrize("recipe", ["ems", "snapkv"])
def test_float8_queries_are_scaled_back(recipe):
    found = []
    for scales in (ONES, QUERY_POWERS):
        with scaled(scales, float8_queries=True):
            # What is merged may be subnormal at one scale, and rounded, and not at another.
            found.append(answers({**settings(recipe), "merger": "none"}))
    assert found[0] == found[1]


def test_scales_of_a_checkpoint_are_used(tmp_path):
    """A checkpoint as llm-compressor writes it: its scales reach the layers and the scores."""
    key, value = (0.125, 0.25, 0.5, 0.0625), (0.5, 0.25, 0.125, 0.25)
    model = checkpoint_with_scales(tmp_path / "scaled", key, value)
    with engine(settings("snapkv"), model) as probe:
        (group,) = probe.worker.compression.groups
        assert group.tensors.stacks[0].key_cache.dtype == torch.float8_e4m3fn
        assert group.tensors.key_scales.tolist() == list(key)
        found = probe.generate(PROMPTS, MAX_TOKENS)
    with scaled(Scales(key, value), exact=False):
        assert found == answers(settings("snapkv"))


def test_scales_of_weights_that_are_loaded_later_are_used(tmp_path):
    """The first checkpoint's are 1, the second one's are powers of two, whose answers differ."""
    ones, others = (1.0,) * 4, (0.125, 0.25, 0.5, 0.0625)
    first = checkpoint_with_scales(tmp_path / "first", ones, ones)
    second = checkpoint_with_scales(tmp_path / "second", others, ones)
    with engine(settings("ems"), second) as probe:
        expected = probe.generate(PROMPTS, MAX_TOKENS)
    with engine(settings("ems"), first) as probe:
        assert probe.generate(PROMPTS, MAX_TOKENS) != expected
        probe.llm.reset_prefix_cache()
        probe.llm.collective_rpc("reload_weights", kwargs={"weights_path": second})
        (group,) = probe.worker.compression.groups
        assert group.tensors.key_scales.tolist() == list(others)
        assert probe.generate(PROMPTS, MAX_TOKENS) == expected


def test_scales_that_a_trainer_sends_are_used():
    """Weight transfer ends in another call than reloading; the sender is left out here."""
    from vllm.v1.worker.gpu_worker import Worker

    scales = (0.5, 0.25, 2.0, 4.0)

    def receive(worker: Any) -> None:
        for layer, scale in zip(worker._attention_layers().values(), scales, strict=True):
            layer._k_scale.fill_(scale)

    with (
        mock.patch.object(Worker, "finish_weight_update", receive),
        engine(settings("snapkv"), kv_cache_dtype="fp8") as probe,
    ):
        (group,) = probe.worker.compression.groups
        assert group.tensors.key_scales.tolist() == [1.0] * 4
        probe.llm.collective_rpc("finish_weight_update")
        assert group.tensors.key_scales.tolist() == list(scales)
        assert [found.key for found in group.tensors.layer_scales] == list(scales)
        probe.worker._attention_layers().popitem()[1]._k_scale = torch.ones(2)
        with pytest.raises(ConfigError, match="scales each kv_head"):
            probe.llm.collective_rpc("finish_weight_update")


def checkpoint_with_scales(folder: Path, key: Sequence[float], value: Sequence[float]) -> str:
    shutil.copytree(LLAMA, folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "dense",
        "config_groups": {},
        "ignore": [],
        "kv_cache_scheme": {
            "num_bits": 8,
            "type": "float",
            "strategy": "tensor",
            "symmetric": True,
            "dynamic": False,
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
    weights = load_file(folder / "model.safetensors")
    for layer, scales in enumerate(zip(key, value, strict=True)):
        for name, scale in zip("kv", scales, strict=True):
            weights[f"model.layers.{layer}.self_attn.{name}_scale"] = torch.tensor([scale])
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def test_everything_beside_the_cache_is_counted():
    """Queries are recorded in the model's dtype, and a block of the cache is a quarter as large."""
    limit = 256 << 20
    options = {"kv_cache_dtype": "fp8", "kv_cache_memory_bytes": limit}
    with engine({**settings("ems"), "workspace_mib": 16}, **options) as probe:
        (group,) = probe.worker.compression.groups
        tensors = group.tensors
        assert tensors.query_ring.queries.dtype == torch.float32
        assert tensors.scores.dtype == torch.float32
        elements = sum(2 * stack.key_cache.numel() for stack in tensors.stacks)
        assert tensors.spec.page_size_bytes * tensors.num_layers * tensors.num_blocks == elements
        footprint = probe.worker._footprint()
        assert footprint.score_bytes(tensors.num_blocks) == tensors.scores.nbytes
        assert footprint.ring_bytes(tensors.num_blocks) == tensors.query_ring.queries.nbytes
        total = elements + footprint.total_bytes(tensors.num_blocks)
        assert limit - (1 << 20) < total <= limit
        assert footprint.query_itemsize == tensors.query_ring.queries.itemsize


class TestRefusals:
    """What is refused at start-up, in one sentence."""

    @pytest.fixture(autouse=True)
    def stopped(self) -> Iterator[None]:
        """Puts back what a worker that was refused had set up."""
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        from ems_vllm.engine.attention import restore_backends

        yield
        restore_backends()
        cleanup_dist_env_and_memory()

    def test_other_formats(self):
        from vllm.config.cache import CacheDType
        from vllm.engine.arg_utils import EngineArgs

        from ems_vllm.config import load_config
        from ems_vllm.engine.frontend.compatibility import check_compatibility

        vllm_config = EngineArgs(model=LLAMA).create_engine_config()
        config = load_config({"recipe": "ems"})
        accepted = ("auto", *FLOAT8_CACHES)
        # Of a dtype that the model's queries do not have.
        without_queries = ("float16", "bfloat16")
        assert {*accepted, *without_queries} < set(get_args(CacheDType))
        assert vllm_config.model_config.dtype == torch.float32
        for dtype in get_args(CacheDType):
            vllm_config.cache_config.cache_dtype = dtype
            if dtype in (*accepted, *without_queries):
                check_compatibility(vllm_config, load_config({"recipe": "knorm"}))
            if dtype in accepted:
                check_compatibility(vllm_config, config)
                continue
            sentence = rf"kv_cache_dtype='{dtype}( with dtype float32)?' cannot be combined"
            with pytest.raises(ConfigError, match=sentence):
                check_compatibility(vllm_config, config)

    def test_a_format_in_an_engine(self):
        with (
            pytest.raises(Exception, match=r"kv_cache_dtype='fp8_e5m2' .*use --kv-cache-dtype"),
            engine(settings("ems"), kv_cache_dtype="fp8_e5m2"),
        ):
            pass

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    def test_a_cache_of_another_dtype_than_the_queries(self, dtype):
        """From 0.33 on vLLM says so itself, before we are asked."""
        ours, theirs = f"'{dtype} with dtype float32'", f'"{dtype}" is incompatible'
        with (
            pytest.raises(Exception, match=rf"kv_cache_dtype=({ours}|{theirs}) .*auto"),
            engine(settings("ems"), kv_cache_dtype=dtype),
        ):
            pass

    @pytest.mark.parametrize(
        ("dtype", "remedy"),
        [
            ("float32", "bfloat16 --dtype bfloat16"),
            ("float16", "float16"),
            ("bfloat16", "bfloat16"),
        ],
    )
    def test_scales_per_head(self, dtype, remedy):
        from vllm.model_executor.layers.attention import Attention

        def load_scales(layer: Any, *args: Any) -> None:
            layer._k_scale = torch.ones(layer.num_kv_heads)

        with (
            mock.patch.object(Attention, "process_weights_after_loading", load_scales),
            pytest.raises(
                ConfigError, match=rf"scales each kv_head .*--kv-cache-dtype {remedy}, or"
            ),
            engine(settings("ems"), kv_cache_dtype="fp8", dtype=dtype),
        ):
            pass
