# SPDX-License-Identifier: Apache-2.0
"""What keeps the kv_heads of a layer from holding different numbers of entries."""

from types import SimpleNamespace

import pytest
import torch
from engine.harness import LLAMA, engine

from ems_vllm.config import ConfigError
from ems_vllm.engine.worker.head_deal import shares_of_rank
from ems_vllm.head_shares import HeadShares

PROFILE = {
    "ratios": [0.5],
    "fractions": {layer: [0.5] for layer in range(4)},
    "head_fractions": {layer: [[0.6], [0.4], [0.5], [0.5]] for layer in range(4)},
}


@pytest.fixture(scope="module")
def worker():
    allocator = {"name": "profile", "profile": PROFILE, "per_head": True, "num_levels": 1}
    with engine({"recipe": "ems", "budget": 64, "allocator": allocator}, LLAMA) as probe:
        yield probe.worker


@pytest.fixture
def layer(worker):
    return list(worker._attention_layers().values())[-1]


def build_group(worker):
    """The group of the running model, built again."""
    (group,) = worker.compression.groups
    return worker._group_builder().group(0, group.tensors.spec, group.layer_names, None)


def refused(worker, reason):
    key = "kv_compression_config.allocator='profile'"
    with pytest.raises(ConfigError, match=f"{key} cannot be .*: {reason}.*; choose the allocator"):
        build_group(worker)


def test_they_can_where_nothing_is_in_the_way(worker):
    assert build_group(worker).heads is not None


@pytest.mark.parametrize("backend", ["FLASHINFER", "FLEX_ATTENTION"])
def test_a_backend_that_plans_for_all_layers_at_once(worker, layer, monkeypatch, backend):
    monkeypatch.setattr(layer, "attn_backend", SimpleNamespace(get_name=lambda: backend))
    refused(worker, f"the attention backend {backend} takes lengths that are the same")


def test_image_tokens_that_see_each_other(worker, layer, monkeypatch):
    monkeypatch.setattr(layer, "attn_backend", SimpleNamespace(get_name=lambda: "FLASH_ATTN"))
    build_group(worker)
    monkeypatch.setattr(worker.model_config, "is_mm_prefix_lm", True)
    refused(worker, "FLASH_ATTN has room for the image tokens of one row")


def test_attention_sinks(worker, layer, monkeypatch):
    monkeypatch.setattr(layer.impl, "sinks", torch.zeros(8))
    refused(worker, "attention sinks are of the query heads of a layer")


def test_layers_that_share_a_cache(worker, layer, monkeypatch):
    monkeypatch.setattr(layer, "kv_sharing_target_layer_name", "model.layers.0")
    refused(worker, "layers share the cache of another one")


def test_a_cache_in_which_slots_come_before_heads(worker, layer, monkeypatch):
    turned = layer.kv_cache.transpose(1, 2).contiguous().transpose(1, 2)
    monkeypatch.setattr(layer, "kv_cache", turned)
    refused(worker, "the cache is not laid out as LBHNC")


@pytest.mark.parametrize(
    ("shares", "reason"),
    [
        ({}, "deals nothing to the kv_heads of model.layers.0.self_attn.attn"),
        (
            {layer: HeadShares((0.5,), ((0.5,), (0.5,))) for layer in range(4)},
            "deals shares to 2 kv_heads of model.layers.0.self_attn.attn, which has 4",
        ),
    ],
)
def test_a_profile_of_another_model(worker, monkeypatch, shares, reason):
    allocator = type(worker._compression_config.allocator)
    monkeypatch.setattr(allocator, "head_shares", lambda self: shares)
    with pytest.raises(ConfigError, match=f"allocator='profile' .*{reason}; set its per_head"):
        build_group(worker)


def test_a_rank_deals_among_its_own_heads():
    of_heads = tuple((part,) for part in (0.1, 0.2, 0.3, 0.4))
    shares = {0: HeadShares((0.25,), of_heads)}

    def dealt(rank, num_ranks, num_heads):
        (of_layer,) = shares_of_rank(
            shares,
            ["model.layers.0.attn"],
            num_heads=num_heads,
            total_heads=4,
            rank=rank,
            num_ranks=num_ranks,
        )
        return of_layer.fractions

    assert [dealt(rank, 2, 2) for rank in range(2)] == [of_heads[:2], of_heads[2:]]
    # Two ranks have the same head.
    assert [dealt(rank, 8, 1) for rank in range(8)] == [(one,) for one in of_heads for _ in "ab"]
