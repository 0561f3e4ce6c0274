# SPDX-License-Identifier: Apache-2.0
"""How a prompt is cut into chunks changes no answer: scores add up over chunks of any size."""

import pytest
from engine.harness import engine, tokens

pytestmark = pytest.mark.slow

BUDGET, RECENT_WINDOW, OBS_WINDOW = 64, 32, 16
PROMPTS = [tokens(length, seed=length) for length in (350, 95, 190, 40)]
# Smaller than the observation window, the recent window and the budget; larger than each of them;
# larger than every prompt.
CHUNKS = (12, 24, 80, 1024)


@pytest.mark.parametrize("recipe", ["knorm", "ems"])
def test_answers_do_not_depend_on_the_chunks(recipe):
    compression = {
        "recipe": recipe,
        "budget": BUDGET,
        "recent_window": RECENT_WINDOW,
        "obs_window": OBS_WINDOW,
        "recompress_interval": 32,
        "min_blocks_saved": 1,
    }
    answers = []
    for chunk in CHUNKS:
        # As many requests at a time as a chunk has tokens, or vLLM refuses the configuration.
        options = {"max_num_batched_tokens": chunk, "max_num_seqs": 8, "max_model_len": 512}
        with engine(compression, **options) as probe:
            answers.append(probe.generate(PROMPTS, 60))
            assert probe.stats()["num_compactions"] > len(PROMPTS)
            probe.assert_pool_is_empty()
    assert all(answer == answers[0] for answer in answers)
