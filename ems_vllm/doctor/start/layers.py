# SPDX-License-Identifier: Apache-2.0
"""Layers and their attention: what a worker would refuse, and what it would leave alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from ems_vllm.config import ConfigError, KVCompressionConfig
from ems_vllm.doctor.start.bare_model import BareModel
from ems_vllm.doctor.start.check import Check, degraded, ok, refused

if TYPE_CHECKING:
    from vllm.v1.kv_cache_interface import KVCacheSpec

    from ems_vllm.engine.worker.layer_choice import LayerChoice

# Bytes that hold a cache of any model: groups do not depend on how many there are.
_PLENTY = 1 << 50


def layer_choice(bare: BareModel, config: KVCompressionConfig) -> LayerChoice:
    """Which layers a worker would compress."""
    from ems_vllm.engine.worker.layer_choice import choose_layers
    from ems_vllm.policies.policy import Policy

    return choose_layers(bare.specs, bare.layers, Policy.from_config(config).scorer)


def specs_of_worker(
    bare: BareModel, choice: LayerChoice, config: KVCompressionConfig
) -> dict[str, KVCacheSpec]:
    """Specs as a worker declares them; all layers and heads.

    Raises:
        ConfigError: the allocator deals to other layers than are compressed.
    """
    from ems_vllm.engine.worker.declared_specs import declared_specs

    return declared_specs(bare.specs, choice, config, bare.vllm_config)


def check_layers(bare: BareModel, config: KVCompressionConfig) -> Iterator[Check]:
    """What can be told of them without weights.

    Args:
        bare: The model.
        config: Settings of compression.
    """
    from ems_vllm.engine.worker.refusals import NO_FULL_ATTENTION

    choice = layer_choice(bare, config)
    total, kept = len(bare.specs), choice.describe_kept()
    yield from _attention(bare, config, choice)
    if not choice.compressed:
        model = bare.vllm_config.model_config.model
        error = NO_FULL_ATTENTION.error(model, config.recipe, layers=kept or "none has a KV cache")
        yield refused("layers", error, _lift_windows(bare))
        return
    try:
        specs = specs_of_worker(bare, choice, config)
        groups = list(_check_groups(bare, config, specs))
    except ConfigError as error:
        yield refused("layers", error)
        return
    if groups:
        yield from groups
    elif kept:
        yield degraded(
            "layers",
            f"{len(choice.compressed)} of {total} compressed; left alone: {kept}",
            _lift_windows(bare) or "nothing is to be done where these are bounded already",
        )
    else:
        yield ok("layers", f"all {total} compressed")


def _lift_windows(bare: BareModel) -> str | None:
    """What to do about windows that are longer than any request; None without such."""
    windows = {getattr(spec, "sliding_window", None) or 0 for spec in bare.specs.values()} - {0}
    if windows and min(windows) >= bare.vllm_config.model_config.max_model_len:
        return (
            """no request is longer than the window: --hf-overrides '{"sliding_window": null}' """
            "says so to vLLM, and these layers are compressed"
        )
    return None


def _attention(
    bare: BareModel, config: KVCompressionConfig, choice: LayerChoice
) -> Iterator[Check]:
    from ems_vllm.engine.worker.layer_checks import check_backends

    counts = Counter(layer.attn_backend.get_name() for layer in bare.layers.values())
    named = ", ".join(counts) or "none"
    try:
        check_backends(bare.layers, sorted(choice.compressed), config.recipe)
    except ConfigError as error:
        yield refused("attention", error)
    else:
        wrapped = ", wrapped by ems-vllm" if choice.compressed else ""
        block_size = bare.vllm_config.cache_config.block_size
        yield ok("attention", f"{named}{wrapped}; blocks of {block_size} tokens")


def _check_groups(
    bare: BareModel, config: KVCompressionConfig, specs: Mapping[str, KVCacheSpec]
) -> Iterator[Check]:
    """Refusals of the groups that vLLM makes of the layers."""
    from ems_vllm.engine.kv_cache_spec import CompressedAttentionSpec
    from ems_vllm.engine.worker.layer_choice import mixed_layer
    from ems_vllm.engine.worker.refusals import MIXED_GROUP
    from ems_vllm.vllm_versions import kv_cache_configs

    (found,) = kv_cache_configs(bare.vllm_config, [dict(specs)], [_PLENTY])
    mixed = mixed_layer(found, specs)
    if mixed is not None:
        model = bare.vllm_config.model_config.model
        yield refused("layers", MIXED_GROUP.error(model, config.recipe, name=mixed))
        return
    for group in found.kv_cache_groups:
        if isinstance(group.kv_cache_spec, CompressedAttentionSpec):
            for refusal in _group_refusals(bare, config, group.kv_cache_spec, group.layer_names):
                yield refused("layers", refusal)


def _group_refusals(
    bare: BareModel, config: KVCompressionConfig, spec: KVCacheSpec, names: list[str]
) -> Iterator[ConfigError]:
    """What is refused of one group; scales of its cache are in the weights."""
    from vllm.model_executor.models.utils import extract_layer_index
    from vllm.v1.worker.utils import select_common_block_size

    from ems_vllm.engine.worker import layer_checks
    from ems_vllm.engine.worker.refusals import SPLIT_BLOCKS

    layers, model, recipe = bare.layers, bare.vllm_config.model_config.model, config.recipe
    owners = [name for name in names if not layers[name].kv_sharing_target_layer_name]
    backends = list({layers[name].attn_backend for name in names})
    native = select_common_block_size(spec.block_size, backends)
    if native != spec.block_size:
        yield SPLIT_BLOCKS.error(spec.block_size, recipe, native=native)
    num_heads = layers[owners[0]].num_heads
    indices = [extract_layer_index(name) for name in owners]
    checks = (
        lambda: layer_checks.common_scale(layers, owners, model, recipe),
        lambda: layer_checks.check_query_heads(layers, owners, config.scorer, model, recipe),
        lambda: layer_checks.check_profile(indices, num_heads, config.scorer, recipe),
        lambda: _check_heads(bare, config, owners),
        lambda: _check_output_weights(bare, config, owners),
    )
    for check in checks:
        try:
            check()
        except ConfigError as error:
            yield error


def _check_heads(bare: BareModel, config: KVCompressionConfig, owners: list[str]) -> None:
    """Of an allocator that deals to kv_heads."""
    from ems_vllm.engine.attention.head_rows import why_not_at_all
    from ems_vllm.engine.worker.head_deal import HeadsDiffer, shares_of_rank
    from ems_vllm.engine.worker.refusals import HEAD_SHARES, UNSPLIT_HEADS

    allocator, model = config.allocator, bare.vllm_config.model_config
    if not allocator.deals_to_heads:
        return
    for name in owners:
        reason = why_not_at_all(bare.layers[name], model.is_mm_prefix_lm)
        if reason is not None:
            raise UNSPLIT_HEADS.error(allocator.name(), config.recipe, reason=reason)
    shares, heads = allocator.head_shares(), model.get_total_num_kv_heads()
    if shares is None:
        return
    try:
        shares_of_rank(shares, owners, num_heads=heads, total_heads=heads, rank=0, num_ranks=1)
    except HeadsDiffer as error:
        raise HEAD_SHARES.error(allocator.name(), config.recipe, reason=error) from None


def _check_output_weights(bare: BareModel, config: KVCompressionConfig, owners: list[str]) -> None:
    from ems_vllm.engine.group.output_projection import output_weights
    from ems_vllm.engine.worker.refusals import NO_OUTPUT_WEIGHTS

    # On a CPU, weights are read another way once they are loaded.
    on_cuda = bare.vllm_config.device_config.device_type == "cuda"
    if not config.selector.reads_output_weights or not on_cuda:
        return
    found = output_weights(bare.module, [bare.layers[name] for name in owners])
    for name, weight in zip(owners, found, strict=True):
        if weight is None:
            selector = config.selector.name()
            raise NO_OUTPUT_WEIGHTS.error(selector, config.recipe, name=name)
