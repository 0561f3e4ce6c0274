# SPDX-License-Identifier: Apache-2.0
"""Tables of figures in pages, measured or by arithmetic, and of recipes.

In a page, between `<!-- table NAME -->` and `<!-- end -->`, stands what TABLES[NAME] gives, so that
no figure is copied by hand: `python docs/generate.py` writes it, tests/test_docs.py compares.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial

from tables import methods
from tables.answers import full_cache, scores
from tables.capacity import capacity
from tables.coverage import kept
from tables.guard import costs, guard, ranks
from tables.markdown import percent
from tables.monitoring import metrics, panels
from tables.peers import behind, change, peers
from tables.pressure import pressure
from tables.recipes import Column, ablation, equal_bytes, recipes, right

_MARKED = re.compile(r"(<!-- table (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def fill(page: str) -> str:
    """A page with its tables as they are now."""
    return _MARKED.sub(lambda found: f"{found[1]}{TABLES[found[2]]()}\n{found[3]}", page)


_SMOLLM2 = "lab-smollm2-scorers.json"
_SMOLLM2_PEERS = "kvpress-smollm2-answers.json"
_ALLOCATORS = "lab-smollm2-allocators.json"
_HEADS = "lab-smollm2-heads.json"
_HEADS_4K = "lab-smollm2-4k-heads.json"
_ALLOCATORS_GEMMA = "lab-gemma3-270m-allocators.json"

_BUDGETS_4K = "lab-smollm2-4k-budgets.json"
_COVERAGE_GEMMA = "lab-gemma3-270m-coverage.json"


def _by_question(variants: dict[str, str]) -> dict[str, tuple[str, str]]:
    """Rows: variants by what the table calls them, for each place of the question."""
    places = {
        "question at the end of the prompt": "last",
        "before the document": "first",
        "after the document was compressed": "later",
    }
    return {
        f"{when}: {what}": (variant, group)
        for when, group in places.items()
        for what, variant in variants.items()
    }


# Rows of the tables by which a budget is chosen.
_CHOOSING = _by_question({"equal budgets": "ems", "profile by head": "ems, profile by head"})

# Further questions on the same novels.
_SEEDS = "lab-smollm2-seeds.json"
_SEEDS_PEERS = "kvpress-smollm2-seeds.json"
_NOT_LAST = ("first", "later")

_SMOLLM2_4K = "lab-smollm2-4k.json"
_SMOLLM2_4K_PEERS = "kvpress-smollm2-4k.json"
_SMOLLM2_8K = "lab-smollm2-8k.json"
_GEMMA = "lab-gemma3-270m.json"
_GEMMA_PEERS = "kvpress-gemma3-270m.json"

_MERGERS = {
    "none": "no merging",
    "no mass": "values, without mass",
    "keys too, no mass": "keys and values, without mass (our reading of the paper)",
    "keys too": "keys and values, with mass",
    "threshold 0.8": "values with mass, redundancy from 0.8 on",
    "threshold 0.6": "**from 0.6 on (default)**",
    "threshold 0.45": "from 0.45 on",
    "threshold 0.3": "from 0.3 on",
    "threshold 0.3, candidates 8": "from 0.3 on, 8 candidates a centre",
    "no zero class": "no zero class, 8 candidates a centre",
}
_MERGE_WEIGHTS = {
    "no merging": "no merging",
    "default": "**weights of unpooled attention (default)**",
    "pooled weights": "of the combined score (ranks), pooled",
    "accumulated weights": "of accumulated attention",
    "weights times value norm": "unpooled attention times the value's norm",
    "equal weights": "equal",
    "classes by un-rotated keys": "default, classes by keys before RoPE",
    "keys too, no mass": "keys and values, without mass",
    "keys too, no mass, un-rotated": "the same, keys before RoPE",
}
_PROFILES = {
    "uniform": "`uniform`",
    "profile, share 0": "`profile`, nothing shared equally",
    "profile, share 0.2": "0.2 of the budget shared equally",
    "profile": "**0.4, 3 levels (default)**",
    "profile, share 0.6": "0.6",
    "profile, 2 levels": "0.4, 2 levels",
    "profile, 6 levels": "0.4, 6 levels",
    "profile, 30 levels": "0.4, a level for each of the 30 layers",
    "pyramid": "`pyramid`, 3 levels",
    "pyramid, 30 levels": "`pyramid`, 30 levels",
}
_ORDERS = {
    "equal": "equal budgets: **keys (EMS)**",
    "equal, by KVzip": "equal budgets: KVzip's score",
    "equal, by keys and a surrogate": "equal budgets: keys and a surrogate of KVzip's score",
    "by head": "profile by head: **keys (EMS)**",
    "by head, by KVzip": "profile by head: KVzip's score",
    "by head, by a surrogate": "profile by head: a surrogate of KVzip's score",
    "by head, by keys and a surrogate": "profile by head: keys and the surrogate",
}
_DEALINGS = {
    "equal, merged": "equal budgets",
    "ada": "`ada`: heads of a layer by attention",
    "ada, peaks of 64": "by peaks of the last 64 queries",
    "ada, peaks of 256": "by peaks of the last 256 queries",
    "ada, KVzip": "by KVzip's score of each prompt",
    "layers, merged": "`profile` of the layers",
    "by head, merged": "**`profile` by head, 3 levels**",
    "by head, 6 levels": "6 levels",
    "by head, 30 levels": "a level for each of the 30 layers",
    "by head, blocks of 4": "3 levels, blocks of 4 entries instead of 16",
}
_SAMPLES = {
    "last 256 (default)": "**the last 256, each (default)**",
    "last 256, one in 4": "the last 256, one in 4",
    "all": "all, each",
    "all, one in 4": "**all, one in 4 (default of `all`)**",
    "all, one in 16": "all, one in 16",
    "all, one in 64": "all, one in 64",
}
_SAMPLING = "lab-smollm2-sampling.json"
_SAMPLING_4K = "lab-smollm2-4k-sampling.json"
_SAMPLING_GEMMA = "lab-gemma3-270m-sampling.json"
_RECOMPRESSED = {
    "ems": "**values with mass (default)**",
    "ems, not merged": "no merging",
    "no mass": "values, without mass",
    "keys too, no mass": "keys and values, without mass",
}


def _sampled(result: str) -> list[Column]:
    return [
        Column(result, budget, group)
        for budget, groups in (
            ("0.06", ("last", "first", "later", "continuation")),
            ("0.125", ("later", "continuation")),
            ("0.25", ("last", "first", "later", "continuation")),
        )
        for group in groups
    ]


def _by_merger(result: str) -> list[Column]:
    return [
        Column(result, budget, group)
        for budget in ("0.06", "0.25")
        for group in ("error", "last", "later", "continuation")
    ]


def _asked(result: str) -> list[Column]:
    return [
        Column(result, budget, "asked", percent(budget)) for budget in ("0.06", "0.125", "0.25")
    ]


def _by_interval() -> list[Column]:
    return [
        Column(f"lab-smollm2-recompressed-{interval}.json", budget, "continuation", title)
        for budget, entries in (("0.06", "6 %"), ("0.25", "25 %"))
        for interval, title in ((64, f"{entries}, every 64"), (16, f"{entries}, every 16"))
    ]


TABLES: dict[str, Callable[[], str]] = {
    "capacity": capacity,
    "dashboard": panels,
    "guard": guard,
    "guard-costs": costs,
    "guard-ranks": ranks,
    "pressure": pressure,
    "methods": methods.catalogue,
    "metrics": metrics,
    "methods-measured": partial(methods.measured, "smollm2"),
    "methods-measured-gemma": partial(methods.measured, "gemma3-270m"),
    "methods-not-served": methods.not_served,
    "methods-parts": methods.parts,
    "smollm2-recipes": partial(
        recipes,
        _SMOLLM2,
        (
            "ems",
            "ems, not merged",
            "ems, alignment mean, not merged",
            "snapkv pooled forward over 13",
            "snapkv",
            "h2o",
            "knorm",
            "streaming_llm",
        ),
    ),
    "smollm2-peers": partial(peers, _SMOLLM2, _SMOLLM2_PEERS),
    "smollm2-behind": partial(behind, _SMOLLM2, _SMOLLM2_PEERS),
    "smollm2-kvzip": partial(behind, _SMOLLM2, _SMOLLM2_PEERS, ("kvzip",)),
    "smollm2-kvzip-equal": partial(
        behind,
        _SMOLLM2,
        "kvpress-smollm2-kvzip-equal.json",
        ("kvzip_equal",),
        ("first", "later", "continuation"),
    ),
    "seeds": partial(
        recipes,
        _SEEDS,
        (
            "ems",
            "ems, profile",
            "ems, profile by head",
            "ems, ada",
            "snapkv pooled forward over 13",
            "snapkv",
            "h2o",
        ),
    ),
    "seeds-peers": partial(
        peers,
        _SEEDS,
        _SEEDS_PEERS,
        _NOT_LAST,
        ("ems", "ems, profile", "ems, profile by head"),
    ),
    "seeds-peers-last": partial(
        peers, _SEEDS, _SEEDS_PEERS, ("last", "continuation"), ("ems", "ems, profile by head")
    ),
    "seeds-behind": partial(
        behind,
        (_SMOLLM2, _SEEDS),
        (_SMOLLM2_PEERS, _SEEDS_PEERS),
        ("compactor", "keydiff", "tova"),
        _NOT_LAST,
    ),
    "seeds-kvzip": partial(
        behind,
        (_HEADS, _SEEDS),
        (_SMOLLM2_PEERS, _SEEDS_PEERS),
        ("kvzip",),
        _NOT_LAST,
        "ems, profile by head",
    ),
    "answers": partial(
        right,
        _by_question(
            {
                "**EMS**": "ems",
                "**EMS, profile by head**": "ems, profile by head",
                "SnapKV": "snapkv",
                "H2O": "h2o",
            }
        ),
        ((_HEADS, _SMOLLM2), (_SEEDS,)),
        ("0.06", "0.125", "0.25"),
    ),
    "choosing-2k": partial(
        right, _CHOOSING, ((_HEADS, _SMOLLM2), (_SEEDS,)), ("0.06", "0.125", "0.25")
    ),
    "choosing-4k": partial(right, _CHOOSING, ((_HEADS_4K, _SMOLLM2_4K),), ("0.02", "0.06", "0.25")),
    "allocators": partial(
        recipes,
        _ALLOCATORS,
        tuple(
            f"{recipe}{allocator}"
            for recipe in ("ems", "snapkv pooled forward over 13", "h2o")
            for allocator in ("", ", profile", ", pyramid")
        ),
    ),
    "profile-4k": partial(change, _SMOLLM2_4K, _HEADS_4K, variant="ems, profile"),
    "profile-gemma": partial(change, _ALLOCATORS_GEMMA, _ALLOCATORS_GEMMA, variant="ems, profile"),
    "profile": partial(change, _ALLOCATORS, _ALLOCATORS, variant="ems, profile"),
    "profile-kvzip": partial(
        behind, _ALLOCATORS, _SMOLLM2_PEERS, ("kvzip",), variant="ems, profile"
    ),
    "heads": partial(recipes, _HEADS, ("ems", "ems, profile", "ems, profile by head")),
    "heads-layers": partial(
        change, _HEADS, _HEADS, variant="ems, profile by head", old_variant="ems, profile"
    ),
    "heads-kvzip": partial(
        behind, _HEADS, _SMOLLM2_PEERS, ("kvzip",), variant="ems, profile by head"
    ),
    "heads-4k": partial(recipes, _HEADS_4K, ("ems, profile", "ems, profile by head")),
    "heads-layers-4k": partial(
        change, _HEADS_4K, _HEADS_4K, variant="ems, profile by head", old_variant="ems, profile"
    ),
    "budgets-4k": partial(
        recipes,
        _BUDGETS_4K,
        (
            "ems",
            "ems, coverage",
            "ems, ada",
            "ems, pyramid",
            "ems, profile",
            "ems, profile, coverage",
            "ems, profile by head",
        ),
    ),
    "budgets-4k-kept": partial(kept, _BUDGETS_4K, ("ems, coverage", "ems, profile, coverage")),
    "coverage-4k": partial(change, _BUDGETS_4K, _BUDGETS_4K, variant="ems, coverage"),
    "coverage-profile-4k": partial(
        change,
        _BUDGETS_4K,
        _BUDGETS_4K,
        variant="ems, profile, coverage",
        old_variant="ems, profile",
    ),
    "by-head-4k": partial(change, _BUDGETS_4K, _BUDGETS_4K, variant="ems, profile by head"),
    "ada-4k": partial(change, _BUDGETS_4K, _BUDGETS_4K, variant="ems, ada"),
    "coverage-gemma": partial(change, _COVERAGE_GEMMA, _COVERAGE_GEMMA, variant="ems, coverage"),
    "coverage-gemma-kept": partial(kept, _COVERAGE_GEMMA, ("ems, coverage",)),
    "smollm2-4k-recipes": partial(recipes, _SMOLLM2_4K, ("ems", "snapkv", "h2o")),
    "smollm2-4k-peers": partial(peers, _SMOLLM2_4K, _SMOLLM2_4K_PEERS),
    "smollm2-4k-behind": partial(behind, _SMOLLM2_4K, _SMOLLM2_4K_PEERS),
    "smollm2-8k-recipes": partial(recipes, _SMOLLM2_8K, ("ems", "snapkv", "h2o")),
    "gemma-recipes": partial(
        recipes,
        _GEMMA,
        (
            "ems",
            "ems, not merged",
            "ems, `local_by: sum`, first 52, not merged",
            "snapkv pooled forward over 13",
            "snapkv",
            "h2o",
        ),
    ),
    "gemma-peers": partial(peers, _GEMMA, _GEMMA_PEERS),
    "gemma-behind": partial(behind, _GEMMA, _GEMMA_PEERS),
    "gemma-8k-recipes": partial(recipes, "lab-gemma3-270m-8k.json", ("ems", "snapkv", "h2o")),
    "gemma-32k-recipes": partial(
        recipes, "lab-gemma3-270m-32k.json", ("ems", "snapkv", "h2o"), ("last", "later")
    ),
    "full-cache": partial(
        full_cache,
        {
            "SmolLM2 2,048": _SMOLLM2,
            "4,096": _SMOLLM2_4K,
            "8,000": _SMOLLM2_8K,
            "Gemma 2,048": _GEMMA,
        },
    ),
    "smollm2-server": partial(scores, "eval-smollm2-vllm.json"),
    "equal-bytes": partial(equal_bytes, "equal-bytes-smollm2.json"),
    "all-queries": partial(change, _SMOLLM2, "lab-smollm2-all-queries.json"),
    "all-queries-4k": partial(
        change, _SMOLLM2_4K, "lab-smollm2-4k-all-queries.json", ("first", "later")
    ),
    "sampling": partial(ablation, _SAMPLES, _sampled(_SAMPLING)),
    "sampling-4k": partial(ablation, _SAMPLES, _sampled(_SAMPLING_4K)),
    "sampling-gemma": partial(ablation, _SAMPLES, _sampled(_SAMPLING_GEMMA)),
    "sampling-all": partial(
        change, _SAMPLING, _SAMPLING, variant="all, one in 4", old_variant="all"
    ),
    "sampling-all-4k": partial(
        change, _SAMPLING_4K, _SAMPLING_4K, variant="all, one in 4", old_variant="all"
    ),
    "sampling-all-gemma": partial(
        change, _SAMPLING_GEMMA, _SAMPLING_GEMMA, variant="all, one in 4", old_variant="all"
    ),
    "sampling-last": partial(
        change,
        _SAMPLING,
        _SAMPLING,
        variant="last 256, one in 4",
        old_variant="last 256 (default)",
    ),
    "mergers": partial(ablation, _MERGERS, _by_merger("lab-smollm2-mergers.json")),
    "merge-weights": partial(
        ablation, _MERGE_WEIGHTS, _by_merger("lab-smollm2-merge-weights.json")
    ),
    "profiles": partial(
        ablation,
        _PROFILES,
        [
            Column("tuning-smollm2-allocators.json", budget, group)
            for budget, groups in (
                ("0.06", ("last", "first", "later", "continuation")),
                ("0.25", ("first", "later", "continuation")),
            )
            for group in groups
        ],
    ),
    "orders": partial(ablation, _ORDERS, _asked("tuning-smollm2-dealing.json")),
    "dealings": partial(ablation, _DEALINGS, _asked("tuning-smollm2-dealing.json")),
    "recompressed": partial(ablation, _RECOMPRESSED, _by_interval()),
}
