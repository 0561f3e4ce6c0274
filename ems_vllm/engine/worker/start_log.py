# SPDX-License-Identifier: Apache-2.0
"""The start-up log: what is compressed, what it takes, and how many requests fit."""

from __future__ import annotations

from collections.abc import Mapping
from logging import Logger
from typing import TYPE_CHECKING, Any

from vllm.model_executor.models.utils import extract_layer_index

from ems_vllm.config.request import RequestOptions
from ems_vllm.engine.kv_cache_spec import CompressedAttentionSpec
from ems_vllm.engine.worker.layer_choice import choose_layers
from ems_vllm.engine.worker.request_fit import request_fit
from ems_vllm.head_shares import least_and_most
from ems_vllm.plan import prompt_blocks

if TYPE_CHECKING:
    from vllm.v1.kv_cache_interface import KVCacheConfig

    from ems_vllm.config import KVCompressionConfig
    from ems_vllm.engine.worker.memory import Footprint


def log_start(
    logger: Logger,
    config: KVCompressionConfig,
    kv_cache_config: KVCacheConfig,
    layers: Mapping[str, Any],
    max_model_len: int,
    footprint: Footprint,
) -> None:
    """Say which recipe runs, what it leaves alone and takes, and how many requests fit.

    Args:
        layers: vLLM's attention layers by name.
        footprint: What this worker holds beside the cache.
    """
    parts = " x ".join(
        f"{key}={getattr(config, key).name()}"
        for key in ("scorer", "allocator", "selector", "merger")
    )
    size = f"budget {config.budget}" if config.budget is not None else f"ratio {config.ratio}"
    logger.info(
        "KV-cache compression: recipe %s (%s), %s entries per kv_head, recent window %d, "
        "recompression every %d generated tokens.",
        config.recipe,
        parts,
        size,
        config.recent_window,
        config.recompress_interval,
    )
    if config.covered is not None:
        logger.info(
            "KV-cache compression: coverage: of a budget stay as many entries as hold %g %% of the "
            "score of what is compressed, at least %d; requests are admitted for the whole budget.",
            100 * config.covered.share,
            config.covered.min_budget,
        )
    specs = {
        name: group.kv_cache_spec
        for group in kv_cache_config.kv_cache_groups
        for name in group.layer_names
    }
    compressed = {
        name: spec for name, spec in specs.items() if isinstance(spec, CompressedAttentionSpec)
    }
    others = {name: spec for name, spec in specs.items() if name not in compressed}
    kept = choose_layers(others, layers, config.scorer).describe_kept()
    logger.info(
        "KV-cache compression: %d of %d layers compressed%s.",
        len(compressed),
        len(specs),
        f"; left alone: {kept}" if kept else "",
    )
    _log_within_prompts(logger, config, kv_cache_config, max_model_len)
    if compressed and config.allocator.name() == "uniform":
        logger.info(
            "KV-cache compression: all layers and kv_heads have equal budgets. `ems-vllm "
            "calibrate` measures what each needs, for the allocator `profile`, which may lose far "
            "less at the same memory (docs/budgets.md: where it does, and where not)."
        )
    _log_levels(logger, kv_cache_config, max_model_len)
    _log_heads(logger, config, kv_cache_config, max_model_len)
    blocks = kv_cache_config.num_blocks
    logger.info(
        "KV-cache compression: beside the cache %.1f MiB of scores, %.1f MiB of recorded queries "
        "and %.1f MiB of workspace on each worker.",
        footprint.score_bytes(blocks) / 2**20,
        footprint.ring_bytes(blocks) / 2**20,
        (footprint.workspace_bytes + footprint.head_bytes(blocks)) / 2**20,
    )
    fit = request_fit(kv_cache_config, max_model_len)
    if fit is None:
        return
    logger.info(
        "KV-cache compression: requests of %d tokens that fit: %s dense (%d blocks each), "
        "%s compressed (%d blocks each once the prompt is compressed).",
        max_model_len,
        _requests(fit.dense),
        fit.columns.dense,
        _requests(fit.compressed),
        fit.columns.compressed,
    )


def _requests(fit: float) -> str:
    """How many fit: whole ones, but where a part of one makes a difference."""
    return f"{fit:.1f}" if fit < 10 else str(int(fit))


def _log_within_prompts(
    logger: Logger,
    config: KVCompressionConfig,
    kv_cache_config: KVCacheConfig,
    max_model_len: int,
) -> None:
    """Say that prompts are compressed before they end, and what a request then holds."""
    if config.prefill_interval == 0:
        return
    columns = blocks = 0
    for group in kv_cache_config.kv_cache_groups:
        spec = group.kv_cache_spec
        if isinstance(spec, CompressedAttentionSpec):
            plan = spec.settings.plan(max_model_len, spec.block_size, RequestOptions())
            of_group = plan.max_replay_columns(max_model_len)
            columns, blocks = max(columns, of_group * spec.block_size), blocks + of_group
    logger.info(
        "KV-cache compression: prompts are compressed as they come, every %d tokens, so that a "
        "request of %d tokens holds at most %d entries per kv_head (%d blocks); what comes later "
        "in a prompt attends to what was kept of it.",
        config.prefill_interval,
        max_model_len,
        columns,
        blocks,
    )


def _log_levels(logger: Logger, kv_cache_config: KVCacheConfig, max_model_len: int) -> None:
    """Say how layers share the budget, where they do, and what equal groups of them cost."""
    groups = [
        (group.kv_cache_spec, len(group.layer_names))
        for group in kv_cache_config.kv_cache_groups
        if isinstance(group.kv_cache_spec, CompressedAttentionSpec)
    ]
    if not groups or groups[0][0].settings.shares is None:
        return
    kept = []
    for spec, num_layers in groups:
        plan = spec.settings.plan(max_model_len, spec.block_size, RequestOptions())
        kept.append(f"{plan.budget_blocks * spec.block_size} in {num_layers} layers")
    most = max(num_layers for _, num_layers in groups)
    padding = 1 - sum(num_layers for _, num_layers in groups) / (most * len(groups))
    logger.info(
        "KV-cache compression: entries per kv_head by level, of a prompt of %d tokens: %s; "
        "%.1f%% of the cache is padding between levels.",
        max_model_len,
        ", ".join(kept),
        100 * padding,
    )


def _log_heads(
    logger: Logger,
    config: KVCompressionConfig,
    kv_cache_config: KVCacheConfig,
    max_model_len: int,
) -> None:
    """Say how kv_heads share what their layers keep, where they do."""
    if config.allocator.deals_by_scores:
        logger.info(
            "KV-cache compression: kv_heads share what their layer keeps, by the scores of each "
            "compaction."
        )
    shares = config.allocator.head_shares()
    if shares is None:
        return
    spans = []
    for group in kv_cache_config.kv_cache_groups:
        spec = group.kv_cache_spec
        # A pipeline stage may have no layer of a group.
        if group.layer_names and isinstance(spec, CompressedAttentionSpec):
            plan = spec.settings.plan(max_model_len, spec.block_size, RequestOptions())
            before_window = prompt_blocks(max_model_len, plan.recent_window, spec.block_size)
            layers = [shares[extract_layer_index(name)] for name in group.layer_names]
            pages = least_and_most(layers, plan.budget_blocks, before_window)
            spans += [count * spec.block_size for count in pages]
    if not spans:
        return
    logger.info(
        "KV-cache compression: kv_heads share what their layer keeps: of a prompt of %d tokens "
        "from %d to %d entries.",
        max_model_len,
        min(spans),
        max(spans),
    )
