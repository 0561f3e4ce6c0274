# SPDX-License-Identifier: Apache-2.0
"""Quantised caches on transformers: vLLM's formats, bit for bit where its code runs on a CPU."""

import subprocess
import sys
from pathlib import Path

import interpreter
import pytest
import torch
from engine.harness import LLAMA, tokens
from vllm.model_executor.layers.quantization.turboquant.centroids import get_centroids
from vllm.model_executor.layers.quantization.turboquant.config import TQ_PRESETS, TurboQuantConfig
from vllm.v1.attention.ops.int4_per_token_head import single_rht

from ems_vllm.config import ConfigError, RequestOptions
from ems_vllm.config.cache_shape import CacheShape
from ems_vllm.eval.transformers_engine import quantised
from ems_vllm.eval.transformers_engine.engine import TransformersEngine
from ems_vllm.eval.transformers_engine.quantised import FORMATS, cache_format
from ems_vllm.eval.transformers_engine.server_config import server_config

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
# Layer 5 of 30 is quantised in every format.
INNER, NUM_LAYERS = 5, 30


def vectors(*shape, dtype=torch.bfloat16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype)


def stored(name, keys, values, layer=INNER):
    return FORMATS[name].stored(keys, values, layer, NUM_LAYERS)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("head_size", [64, 128])
def test_error_is_that_of_so_many_bits(name, head_size):
    x = vectors(3, 40, head_size)
    # Of normal numbers; a bit less doubles it. e4m3 has 3 bits behind the point.
    bounds = {"fp8": 0.028, "fp8_p": 0.028, "int8_": 0.009, "int4_": 0.11, "auto": 0.0}
    tq_keys = {"k8v4": 0.028, "4bit": 0.11, "k3v4": 0.2, "3bit": 0.2}
    key_bound = value_bound = bounds.get(name[:5])
    if name.startswith("turboquant_"):
        preset = name.removeprefix("turboquant_")[:4]
        key_bound, value_bound = tq_keys[preset], 0.22 if preset == "3bit" else 0.11
    for read, bound in zip(stored(name, x, x), (key_bound, value_bound), strict=True):
        assert (read.shape, read.dtype) == (x.shape, x.dtype)
        error = float((read - x).float().norm() / x.float().norm())
        assert bound / 3 <= error <= bound
    outer = stored(name, x, x, layer=NUM_LAYERS - 2)[0]
    assert torch.equal(outer, x) == (name == "auto" or name.startswith("turboquant_"))


def test_every_vector_has_scales_of_its_own():
    small, large = vectors(8, 64), 1000 * vectors(8, 64, seed=1)
    both = torch.cat([small, large])
    for name in FORMATS:
        keys, values = stored(name, both, both)
        alone, _ = stored(name, small, small)
        assert torch.equal(keys[:8], alone), name
        if name not in ("auto", "fp8"):
            assert torch.equal(values[:8], stored(name, small, small)[1]), name
    # One scale of 1: what is too large is saturated.
    assert stored("fp8", large, large)[0].abs().max() == 448


def test_float8_is_what_the_cpu_platform_writes():
    from ems_vllm.cpu_platform.attention import _float8_bytes

    x = 200 * vectors(50, 64)
    written = _float8_bytes(x, 1.0).view(torch.float8_e4m3fn).to(x.dtype)
    assert torch.equal(stored("fp8", x, x)[0], written)


@pytest.mark.parametrize("size", [64, 128])
def test_rotations_and_centroids_are_those_of_vllm(size):
    x = vectors(10, size, dtype=torch.float32)
    rotated = (x * quantised._signs(size, CPU)) @ quantised._hadamard(size, CPU)
    torch.testing.assert_close(rotated, single_rht(x))
    for bits in (3, 4):
        torch.testing.assert_close(
            quantised._centroids(size, bits), get_centroids(size, bits), rtol=0, atol=1e-7
        )


def test_rows_that_are_no_power_of_two_are_rotated_in_parts():
    x = vectors(10, 96)
    read, _ = stored("int4_per_token_head", x, x)
    assert 0.03 < (read - x).float().norm() / x.float().norm() < 0.11


@pytest.mark.parametrize("head_size", [64, 80, 128])
def test_bytes_are_those_of_vllm_s_pages(head_size):
    from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend
    from vllm.v1.kv_cache_interface import FullAttentionSpec, get_kv_quant_mode

    shape = CacheShape(num_layers=1, num_kv_heads=3, head_size=head_size, itemsize=2)
    dtypes = {"auto": torch.bfloat16, "fp8": torch.uint8, "fp8_per_token_head": torch.uint8}
    for name, one in FORMATS.items():
        if name.startswith("turboquant_"):
            continue
        spec = FullAttentionSpec(
            block_size=16, num_kv_heads=3, head_size=head_size,
            dtype=dtypes.get(name, torch.int8), kv_quant_mode=get_kv_quant_mode(name),
        )  # fmt: skip
        page = TritonAttentionBackend.customize_spec(spec).page_size_bytes
        assert one.entry_bytes(shape) * 3 * 16 == page, name


@pytest.mark.parametrize("name", TQ_PRESETS)
def test_turboquant_leaves_the_outer_layers_alone(name):
    packed = TurboQuantConfig.from_cache_dtype(name, 64).slot_size_aligned
    shape = CacheShape(num_layers=30, num_kv_heads=3, head_size=64, itemsize=2)
    assert FORMATS[name].entry_bytes(shape) == pytest.approx((26 * packed + 4 * 256) / 30)
    shallow = CacheShape(num_layers=3, num_kv_heads=3, head_size=64, itemsize=2)
    assert FORMATS[name].entry_bytes(shallow) == pytest.approx((packed + 2 * 256) / 3)


_KERNELS = Path(__file__).with_name("quantised_kernels.py")


@pytest.mark.slow
@pytest.mark.interpreter
def test_kernels_of_vllm_write_the_same():
    env = interpreter.environment()
    env["PYTHONPATH"] += f":{Path(__file__).resolve().parents[2]}"
    result = subprocess.run(
        [sys.executable, str(_KERNELS)], env=env, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.split() == ["same"] * 4


def test_mistakes_are_named():
    with pytest.raises(ConfigError, match="kv_cache_dtype='int3' is not known here: use auto, fp8"):
        cache_format("int3")
    with pytest.raises(ConfigError, match="'turboquant_4bit_nc' stores no heads of 96 numbers"):
        cache_format("turboquant_4bit_nc").check(96)
    cache_format("int4_per_token_head").check(96)


@pytest.fixture(scope="module")
def engine():
    return TransformersEngine.load(LLAMA, "cpu", "float32")


PROMPT = tokens(200, seed=7)


def request_of(engine, name, recipe="ems", budget=None):
    config = server_config(recipe, 64, {"recompress_interval": 16}, engine.block_size)
    options = RequestOptions(enabled=recipe != "full", budget=budget)
    scored = engine.scored_queries(len(PROMPT), config, options)
    needed = [] if scored is None else [scored]
    one = FORMATS[name]
    prefilled = engine.prefill(PROMPT, 16, needed, FORMATS[one.prefill])
    return prefilled, engine.request(prefilled, config, options, one)


def test_all_that_is_held_is_stored_in_the_format(engine):
    """The prompt, what is merged, and what is written later; attention of the prompt saw it."""
    plain, _ = request_of(engine, "auto")
    prefilled, request = request_of(engine, "fp8")
    request.extend(tokens(40, seed=8))
    keys, values = request.entries()
    assert keys[0].shape[1] < 100
    for entries in map(torch.stack, (keys, values)):
        assert torch.equal(FORMATS["fp8"].stored(entries, entries, 0, 4)[0], entries)
    # Where the prompt's attention sees other keys, its last logits are others, by a little.
    difference = (prefilled.logits - plain.logits).abs().max()
    assert 1e-3 < difference / plain.logits.std() < 1


def test_a_prompt_that_saw_itself_unrounded_is_stored_afterwards(engine, monkeypatch):
    # Four layers, and TurboQuant leaves four alone.
    name = "turboquant_4bit_nc"
    everywhere = quantised.CacheFormat(name, FORMATS[name].keys, FORMATS[name].values, "auto")
    monkeypatch.setitem(FORMATS, name, everywhere)
    plain, untouched = request_of(engine, "auto", "full")
    prefilled, request = request_of(engine, name, "full")
    assert torch.equal(prefilled.logits, plain.logits)
    keys = torch.stack(untouched.entries()[0])
    request.step(3)
    read = torch.stack(request.entries()[0])
    assert torch.equal(read[:, :, :200], everywhere.stored(keys, keys, 0, 4)[0])
    untouched.step(3)
    own = torch.stack(untouched.entries()[0])
    # The first layer's new key depends on nothing that was rounded; it is stored rounded.
    assert torch.equal(read[0, :, 200], everywhere.stored(own, own, 0, 4)[0][0, :, 200])
