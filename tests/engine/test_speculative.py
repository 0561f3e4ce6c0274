# SPDX-License-Identifier: Apache-2.0
"""Speculative decoding with drafts from n-grams: it saves steps and changes no answer."""

import interpreter
import pytest
from processes import fork_script

LENGTHS = (40, 100, 200)
MAX_TOKENS = 60
NUM_DRAFTS = 3
NGRAM = {
    "method": "ngram",
    "num_speculative_tokens": NUM_DRAFTS,
    "prompt_lookup_min": 1,
    "prompt_lookup_max": 2,
}
# Not by key norms: the four words below tie, and rounding, which drafts change, would decide.
_LAYERS = range(4)
RECIPES = {
    "random": {"recipe": "random"},
    "ems": {"recipe": "ems"},
    # Rows of several tokens, which are put in the order of the heads.
    "by head": {
        "recipe": "ems",
        "allocator": {
            "name": "profile",
            "profile": {
                "ratios": [0.5],
                "fractions": {layer: [0.5] for layer in _LAYERS},
                "head_fractions": {layer: [[0.8], [0.2], [0.7], [0.3]] for layer in _LAYERS},
            },
            "num_levels": 1,
            "per_head": True,
        },
    },
}

_SCRIPT = """
import json, sys
from engine.harness import LLAMA, engine, tokens

case = json.loads(sys.argv[1])
prompts = [tokens(length, seed=length) for length in case["lengths"]]
found = {}
for recipe, own in case["recipes"].items():
    compression = {**case["compression"], **own}
    for name, speculative in (("plain", None), ("drafted", case["speculative"])):
        options = {"speculative_config": speculative, "async_scheduling": False}
        with engine(compression, LLAMA, max_model_len=512, **options) as probe:
            # Four words only: some drafts are right, most are not.
            words = [400, 401, 402, 403]
            answers = probe.generate(prompts, case["max_tokens"], allowed_token_ids=words)
            probe.assert_pool_is_empty()
            found.setdefault(recipe, {})[name] = {
                "answers": answers,
                "num_steps": len(probe.used_blocks),
                "num_compactions": probe.stats()["num_compactions"],
            }
print(json.dumps(found))
"""

pytestmark = pytest.mark.interpreter


@pytest.fixture(scope="module")
def found():
    """What engines with and without drafts did, by recipe."""
    case = {
        "compression": {
            "budget": 32,
            "recent_window": 16,
            "obs_window": 16,
            "recompress_interval": 16,
            "min_blocks_saved": 1,
        },
        "recipes": RECIPES,
        "speculative": NGRAM,
        "lengths": LENGTHS,
        "max_tokens": MAX_TOKENS,
    }
    return fork_script(_SCRIPT, case, interpreter.environment(model_runner=1))


@pytest.mark.parametrize("recipe", RECIPES)
def test_drafts_change_no_answer(found, recipe):
    """Not one query of a rejected draft scores, and no draft reaches past a compaction."""
    plain, drafted = found[recipe]["plain"], found[recipe]["drafted"]
    assert drafted["answers"] == plain["answers"]
    assert drafted["num_compactions"] == plain["num_compactions"] > len(LENGTHS)
    # Accepted drafts save steps; had all been accepted, there would be a quarter of them.
    assert plain["num_steps"] > drafted["num_steps"] > plain["num_steps"] / (1 + NUM_DRAFTS)
