# SPDX-License-Identifier: Apache-2.0
"""Speculative decoding with drafts from n-grams: it saves steps and changes no answer."""

import interpreter
import pytest
from processes import run_script

LENGTHS = (40, 100, 300)
MAX_TOKENS = 90
NUM_DRAFTS = 3
NGRAM = {
    "method": "ngram",
    "num_speculative_tokens": NUM_DRAFTS,
    "prompt_lookup_min": 1,
    "prompt_lookup_max": 2,
}

_SCRIPT = """
import json, sys
from engine.harness import LLAMA, engine, tokens

case = json.loads(sys.argv[1])
prompts = [tokens(length, seed=length) for length in case["lengths"]]
options = {"speculative_config": case["speculative"], "async_scheduling": False}
with engine(case["compression"], LLAMA, **options) as probe:
    # Four words only: some drafts are right, most are not.
    answers = probe.generate(prompts, case["max_tokens"], allowed_token_ids=[400, 401, 402, 403])
    probe.assert_pool_is_empty()
    print(json.dumps({
        "answers": answers,
        "num_steps": len(probe.used_blocks),
        "compactions": probe.stats()["num_compactions"],
    }))
"""

pytestmark = pytest.mark.interpreter


@pytest.mark.parametrize("recipe", ["knorm", "ems"])
def test_drafts_change_no_answer(recipe):
    """Not one query of a rejected draft scores, and no draft reaches past a compaction."""
    case = {
        "compression": {
            "recipe": recipe,
            "budget": 32,
            "recent_window": 16,
            "obs_window": 16,
            "recompress_interval": 16,
            "min_blocks_saved": 1,
        },
        "lengths": LENGTHS,
        "max_tokens": MAX_TOKENS,
    }
    environment = interpreter.environment(model_runner=1)
    plain = run_script(_SCRIPT, case | {"speculative": None}, environment)
    drafted = run_script(_SCRIPT, case | {"speculative": NGRAM}, environment)
    assert drafted["answers"] == plain["answers"]
    assert drafted["compactions"] == plain["compactions"] > len(LENGTHS)
    # Accepted drafts save steps; had all been accepted, there would be a quarter of them.
    assert plain["num_steps"] > drafted["num_steps"] > plain["num_steps"] / (1 + NUM_DRAFTS)
