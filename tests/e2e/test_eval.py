# SPDX-License-Identifier: Apache-2.0
"""The evaluation against real servers: the smoke preset, and prediction from a compressed cache."""

import asyncio
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from e2e.clients import prompt

from ems_vllm.eval.records import preset
from ems_vllm.eval.records.results import EvalResult
from ems_vllm.eval.server.endpoint import Endpoint, NoAnswer
from ems_vllm.eval.server.process import Server

PROCESSOR = "ems_vllm.engine.measuring.forced_tokens:ForcedTokens"
SMOKE = preset.load("smoke", {})


def evaluate(models: Path, output: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from ems_vllm.cli import main; main()", "eval"]
    arguments = [str(models / "ems-tiny"), "--preset", "smoke", "--output", str(output)]
    return subprocess.run([*command, *arguments], capture_output=True, text=True)


@pytest.fixture(scope="module")
def smoke(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("smoke")
    finished = evaluate(models, output)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return output


def test_every_kind_of_request_is_answered(smoke: Path) -> None:
    result = EvalResult.read(smoke / "results.json")
    assert [(m.method, m.budget_fraction) for m in result.methods] == [
        ("full", None),
        ("ems", 0.25),
    ]
    for method in result.methods:
        assert [s for s in method.samples if s.error] == []
        assert {s.task for s in method.samples} == set(SMOKE.tasks)
        assert all(0 <= s.score <= 1 for s in method.samples if s.task != "bits_per_byte")
        assert all(s.score > 0 for s in method.samples if s.task == "bits_per_byte")
    full, ems = (method.samples for method in result.methods)
    assert [(s.task, s.protocol, s.index) for s in full] == [
        (s.task, s.protocol, s.index) for s in ems
    ]
    # The control of everything above: the cache that answered was compressed.
    assert [s.output for s in full] != [s.output for s in ems]


def test_needles_survive_compression(smoke: Path) -> None:
    """models/ems-tiny finds them with its full cache, and with a quarter of it."""
    for method in EvalResult.read(smoke / "results.json").methods:
        scores = [s.score for s in method.samples if (s.task, s.protocol) == ("niah", "last")]
        assert scores == [1, 1]


def test_every_protocol_is_asked(smoke: Path) -> None:
    for method in EvalResult.read(smoke / "results.json").methods:
        by_protocol = {
            protocol: {s.task for s in method.samples if s.protocol == protocol}
            for protocol in ("last", "first", "later")
        }
        assert by_protocol["last"] == set(SMOKE.tasks)
        assert by_protocol["first"] == by_protocol["later"]
        assert by_protocol["first"] == set(SMOKE.tasks) - {
            "bits_per_byte", "multi_turn", "long_generation"
        }  # fmt: skip


def test_the_full_cache_is_what_others_follow(smoke: Path) -> None:
    full, ems = (
        [s.followed for s in method.samples if s.task == "agreement_summary"]
        for method in EvalResult.read(smoke / "results.json").methods
    )
    assert all(f.num_same == f.num_tokens and f.kl == 0 for f in full)
    # The control: a quarter of the cache does not predict exactly the same.
    assert all(f.kl > 0 for f in ems)
    assert [f.num_tokens for f in ems] == [f.num_tokens for f in full]


def test_memory_is_what_the_budget_says(smoke: Path) -> None:
    full, ems = (m.serving for m in EvalResult.read(smoke / "results.json").methods)
    # A quarter of the length and less than a block of it, and the column that is begun.
    assert ems.blocks_per_request <= 0.25 * full.blocks_per_request + 2
    assert ems.kv_bytes_per_request / full.kv_bytes_per_request == pytest.approx(
        ems.blocks_per_request / full.blocks_per_request
    )
    assert ems.peak_blocks > 0
    assert full.peak_blocks > full.blocks_per_request
    for serving in (full, ems):
        assert serving.ttft_s > 0
        assert serving.tpot_s > 0
        assert serving.output_tokens_per_s > 0


def test_report_is_written(smoke: Path) -> None:
    assert "<html" in (smoke / "report.html").read_text()


def test_a_finished_run_starts_no_server(smoke: Path, models: Path) -> None:
    before = EvalResult.read(smoke / "results.json")
    for log in smoke.glob("server-*.log"):
        log.unlink()
    finished = evaluate(models, smoke)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert list(smoke.glob("server-*.log")) == []
    assert EvalResult.read(smoke / "results.json").methods == before.methods


@pytest.fixture(scope="module")
def prescribing(start_server: Callable[..., Server]) -> Iterator[Server]:
    """A compressing server with room for everything that takes prescribed answers."""
    config = '{"budget": 2048, "recent_window": 16, "obs_window": 16, "recompress_interval": 64}'
    with start_server(
        "random-llama",
        *("--kv-compression", "ems", "--kv-compression-config", config),
        *("--logits-processors", PROCESSOR),
    ) as running:
        yield running


def ask(server: Server, question: Callable[[Endpoint], Awaitable[Any]]) -> Any:
    async def run() -> Any:
        async with Endpoint(server.url, server.model, concurrency=4) as endpoint:
            return await question(endpoint)

    return asyncio.run(run())


def test_prescribed_answers_have_the_model_s_own_probabilities(prescribing: Server) -> None:
    """As part of a prompt, generated with everything kept, and generated from a small cache."""
    tokens = prompt(760, seed=21)
    before, after = tokens[:600], tokens[600:]
    in_prompt = ask(prescribing, lambda e: e.predict(before, after)).logprobs
    kept = ask(prescribing, lambda e: e.prescribe(before, after)).logprobs
    small = {"kv_budget": 32}
    compressed = ask(prescribing, lambda e: e.prescribe(before, after, xargs=small)).logprobs
    assert len(in_prompt) == len(kept) == len(compressed) == len(after)
    # float32: chunks of a prompt and single tokens differ in the order of sums.
    assert kept == pytest.approx(in_prompt, abs=1e-3)
    # The first token is predicted by the prompt itself, before anything is compressed.
    assert compressed[0] == pytest.approx(in_prompt[0], abs=1e-3)
    assert max(abs(a - b) for a, b in zip(compressed, in_prompt, strict=True)) > 0.1


def test_what_follows_a_prescribed_answer_is_free(prescribing: Server) -> None:
    """Side by side with others, each gets its own."""
    tokens = prompt(300, seed=22)

    async def several(endpoint: Endpoint) -> Any:
        return await asyncio.gather(
            endpoint.complete(tokens[:290], 8),
            *(endpoint.prescribe(tokens[:n], tokens[n:290], num_free_tokens=8) for n in (9, 280)),
        )

    free, early, late = ask(prescribing, several)
    assert early.free_token_ids == late.free_token_ids
    assert len(late.free_token_ids) == 8
    assert free.num_tokens == 8


def test_a_prescribed_end_of_sequence_ends_nothing(prescribing: Server) -> None:
    """As between a question that comes later and its answer, in many chat templates."""
    eos = 2
    tokens = [*prompt(60, seed=23), eos, *prompt(5, seed=24)]

    async def both(endpoint: Endpoint) -> Any:
        whole = await endpoint.prescribe(tokens[:40], tokens[40:], num_free_tokens=6)
        third = whole.free_token_ids[2]
        ended = await endpoint.prescribe(
            tokens[:40], tokens[40:], num_free_tokens=6, num_top=1, end_token_ids={eos, third}
        )
        return whole, ended

    whole, ended = ask(prescribing, both)
    assert len(whole.free_token_ids) == 6
    first = whole.free_token_ids.index(whole.free_token_ids[2])
    assert ended.free_token_ids == whole.free_token_ids[: first + 1]
    assert len(ended.tops) == ended.num_tokens == len(tokens) - 40 + first + 1


def test_what_an_endpoint_can_do_is_found_out(prescribing: Server, server: Server) -> None:
    for running, can_prescribe in ((prescribing, True), (server, False)):
        assert ask(running, lambda e: e.can_prescribe()) == can_prescribe
        assert ask(running, lambda e: e.compresses())


def test_a_wrong_prescription_is_refused(prescribing: Server) -> None:
    with pytest.raises(NoAnswer, match=r"HTTP 400: vllm_xargs.forced_token_ids=.* is not allowed"):
        ask(prescribing, lambda e: e.prescribe([5, 6], ["a"]))
    # The engine lives on, also where a token does not exist.
    with pytest.raises(NoAnswer, match="did not generate the prescribed tokens"):
        ask(prescribing, lambda e: e.prescribe([5, 6], [10**6]))
    assert ask(prescribing, lambda e: e.complete([5, 6], 2)).num_tokens == 2
