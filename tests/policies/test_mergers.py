# SPDX-License-Identifier: Apache-2.0
"""What becomes of entries that do not stay, against the formulas of each merger."""

from __future__ import annotations

import math

import pytest
import torch
from policies.contexts import NUM_SINKS, Row, build_context, entries
from torch.nn.functional import cosine_similarity

from ems_vllm.config import load_config
from ems_vllm.policies.base import MERGERS
from ems_vllm.policies.policy import Policy

ROWS = (
    Row(num_entries=64, tail=9, budget=24, seed=1),
    Row(num_entries=40, tail=3, budget=16, num_scored=24, num_represented=25, seed=2),
)


class Merged:
    """A compaction by `h2o` and a merger, and what its classes should be made of."""

    def __init__(self, name, row, layer, head, **options):
        self.merger = {"name": name, **options}
        settings = {"recipe": "h2o", "merger": self.merger}
        settings["selector"] = {"num_sink_tokens": NUM_SINKS}
        policy = Policy.from_config(load_config(settings))
        context = build_context(ROWS)
        before = [
            entries(cache, context, row)[layer, head, : ROWS[row].num_entries].clone()
            for cache in (context.key_cache, context.value_cache)
        ]
        self.keys, self.values = (tensor.double() for tensor in before)
        self.mass_key = context.mass_keys()[layer, row, head].double()
        scores = policy.score(context)
        self.weights = scores.weights[layer, row, head].double()
        kept_idx = policy.place(context, scores)[layer, row, head].tolist()
        self.kept = [entry for entry in kept_idx if entry >= 0]
        self.dropped = sorted(set(range(len(self.keys))) - set(self.kept))
        first = ROWS[row].num_entries - ROWS[row].budget
        self.found = [
            entries(cache, context, row)[layer, head, first : ROWS[row].num_entries].double()
            for cache in (context.key_cache, context.value_cache)
        ]

    def assert_classes(self, class_of, weight_of, *, mean_keys=True, sums=False, mass=False):
        """class_of: by dropped entry, the kept one that it joins; weight_of: its weight."""
        assert set(class_of) <= set(self.dropped)
        assert not set(class_of.values()) & set(range(NUM_SINKS))
        for rank, centre in enumerate(self.kept):
            members = [entry for entry, joined in class_of.items() if joined == centre]
            weights = torch.tensor([1.0, *(weight_of[m] for m in members)], dtype=torch.double)
            every = [centre, *members]
            key = self.keys[centre]
            if mean_keys and members:
                key = weights @ self.keys[every] / weights.sum()
            if mass and members:
                key = key + math.log(min(weights.sum(), len(every))) * self.mass_key
            value = weights @ self.values[every] / (1.0 if sums else weights.sum())
            torch.testing.assert_close(self.found[0][rank], key, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(self.found[1][rank], value, rtol=1e-4, atol=1e-5)


@pytest.fixture(
    params=[(row, layer, head) for row in (0, 1) for layer in (0, 1) for head in (0, 1)]
)
def merged(request):
    return lambda name, **options: Merged(name, *request.param, **options)


@pytest.mark.parametrize("keep_mass", [False, True])
def test_elastic_joins_the_nearest_in_the_text(merged, keep_mass):
    found = merged("elastic", keep_mass=keep_mass)
    centres = [entry for entry in found.kept if entry >= NUM_SINKS]
    # Of two that are as near, the later one.
    nearest = {e: min(centres, key=lambda c: (abs(c - e), -c)) for e in found.dropped}
    found.assert_classes(nearest, dict.fromkeys(found.dropped, 1.0), mass=keep_mass)


def test_cam_adds_values_to_the_next_kept_entry(merged):
    found = merged("cam")
    after = {e: min((c for c in found.kept if c > e), default=None) for e in found.dropped}
    classes = {e: c for e, c in after.items() if c is not None}
    mean = found.weights[found.kept].mean()
    weights = {e: min(1.0, (found.weights[e] / mean).item()) for e in classes}
    found.assert_classes(classes, weights, mean_keys=False, sums=True)


def nearest_keys(found):
    centres = [entry for entry in found.kept if entry >= NUM_SINKS]
    cosines = cosine_similarity(found.keys[:, None], found.keys[None, centres], dim=-1)
    # Opposite keys are as unlike as any.
    best = cosines.clamp(min=0).max(-1)
    nearest = {e: centres[int(best.indices[e])] for e in found.dropped}
    return nearest, {e: cosines[e, best.indices[e]].item() for e in found.dropped}


@pytest.mark.parametrize("keep_mass", [False, True])
def test_clusters_take_in_the_most_similar_keys(merged, keep_mass):
    found = merged("clusters", keep_mass=keep_mass)
    nearest, _ = nearest_keys(found)
    found.assert_classes(nearest, dict.fromkeys(found.dropped, 1.0), mass=keep_mass)


def test_d2o_merges_what_is_more_similar_than_the_mean(merged):
    found = merged("d2o")
    nearest, cosines = nearest_keys(found)
    mean = sum(cosines.values()) / len(cosines)
    classes = {e: c for e, c in nearest.items() if cosines[e] >= mean}
    assert classes.keys() != nearest.keys()
    found.assert_classes(classes, cosines)


@pytest.mark.parametrize("similar", [0.0, 0.2, -1.0])
def test_kvmerger_merges_along_chains_of_similar_keys(merged, similar):
    found = merged("kvmerger", similar=similar, sigma=3.0)
    alike = cosine_similarity(found.keys[:-1], found.keys[1:], dim=-1)
    classes, weights = {}, {}
    for entry in found.dropped:
        before = max((c for c in found.kept if c < entry), default=None)
        after = min((c for c in found.kept if c > entry), default=None)
        best = -1.0
        for centre in (before, after):
            if centre is None or centre < NUM_SINKS:
                continue
            low, high = sorted((centre, entry))
            if (alike[low:high] > similar).all():
                distance = (found.keys[entry] - found.keys[centre]).square().sum()
                kernel = math.exp(-distance / (2 * 3.0**2))
                if kernel > best:
                    best, classes[entry], weights[entry] = kernel, centre, kernel
    if similar < 0:
        assert len(classes) == len(found.dropped)
    found.assert_classes(classes, weights)


def test_compensation_is_one_entry_for_all_that_is_dropped(merged):
    found = merged("compensation")
    centres = [entry for entry in found.kept if entry >= NUM_SINKS]
    lowest = min(centres, key=lambda centre: found.weights[centre])
    classes = dict.fromkeys(found.dropped, lowest)
    found.assert_classes(classes, dict.fromkeys(found.dropped, 1.0), mass=True)


@pytest.mark.parametrize("name", list(MERGERS))
def test_where_all_stays_nothing_changes(name):
    rows = [Row(num_entries=40, tail=5, budget=40, num_represented=9, seed=5)]
    context = build_context(rows)
    before = [cache.clone() for cache in (context.key_cache, context.value_cache)]
    Policy.from_config(load_config({"recipe": "ems", "merger": name})).compact(context)
    for old, new in zip(before, (context.key_cache, context.value_cache), strict=True):
        assert torch.equal(old.contiguous().view(torch.int32), new.contiguous().view(torch.int32))
