# SPDX-License-Identifier: Apache-2.0
"""Prescribed answers: generated as prescribed, with either model runner, also after preemption."""

import interpreter
import pytest
from engine.harness import LLAMA, engine, tokens
from processes import fork_script

pytestmark = pytest.mark.slow

PROCESSOR = "ems_vllm.engine.measuring.forced_tokens:ForcedTokens"
COMPRESSION = {
    "recipe": "ems",
    "budget": 32,
    "recent_window": 16,
    "obs_window": 8,
    "recompress_interval": 16,
    "min_blocks_saved": 1,
}
PROMPT_LENGTHS = (40, 150, 90)
NUM_FORCED, NUM_FREE = 24, 4
FORCED = [tokens(NUM_FORCED, seed=100 + length) for length in PROMPT_LENGTHS]

_SCRIPT = """
import json, sys
import torch
torch.cuda.get_device_capability = lambda *args, **kwargs: (9, 0)
from engine.test_forced_tokens import run
case = json.loads(sys.argv[1])
print(json.dumps(run(**case)))
"""


def run(**options):
    """Answers and log probabilities of requests side by side, the last one free; preemptions."""
    from vllm import SamplingParams

    prompts = [tokens(length, seed=length) for length in (*PROMPT_LENGTHS, 70)]
    arguments = {"temperature": 0, "ignore_eos": True, "logprobs": 0}
    params = [
        SamplingParams(
            max_tokens=NUM_FORCED + NUM_FREE, extra_args={"forced_token_ids": forced}, **arguments
        )
        for forced in FORCED
    ]
    params.append(SamplingParams(max_tokens=NUM_FORCED, **arguments))
    with engine(COMPRESSION, LLAMA, logits_processors=[PROCESSOR], **options) as probe:
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        outputs = [o.outputs[0] for o in probe.llm.generate(inputs, params, use_tqdm=False)]
        return {
            "answers": [list(output.token_ids) for output in outputs],
            "logprobs": [
                [at[token].logprob for at, token in zip(o.logprobs, o.token_ids, strict=True)]
                for o in outputs
            ],
            "preemptions": probe.num_preemptions,
            "runner": type(probe.worker.model_runner).__module__,
        }


def check(found):
    for answer, forced in zip(found["answers"], FORCED, strict=False):
        assert answer[:NUM_FORCED] == forced
        assert len(answer) == NUM_FORCED + NUM_FREE
    for logprobs in found["logprobs"]:
        # Of a random model and random tokens; a token that was the only one left would have 0.
        assert all(logprob < -1e-3 for logprob in logprobs)


@pytest.fixture(scope="module")
def plenty():
    return run()


def test_prescribed_answers_side_by_side(plenty):
    check(plenty)
    assert plenty["preemptions"] == 0


def test_nobody_else_s_answer_changes(plenty):
    with engine(COMPRESSION, LLAMA) as probe:
        alone = probe.generate([tokens(70, seed=70)], NUM_FORCED)
    assert plenty["answers"][-1] == alone[0]


def test_preemption_changes_nothing(plenty):
    found = run(max_model_len=192, num_blocks=15)
    check(found)
    assert found["preemptions"] > 0
    assert found["answers"] == plenty["answers"]


@pytest.mark.interpreter
def test_v2_generates_the_same(plenty):
    found = fork_script(_SCRIPT, {}, interpreter.environment())
    assert found["runner"] == "vllm.v1.worker.cpu.model_runner"
    check(found)
    assert found["answers"] == plenty["answers"]
    for ours, theirs in zip(found["logprobs"], plenty["logprobs"], strict=True):
        assert ours == pytest.approx(theirs, abs=1e-3)
