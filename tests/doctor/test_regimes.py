# SPDX-License-Identifier: Apache-2.0
"""What the doctor says of real servers in every regime, by the pages that were recorded of them."""

import pytest
from doctor.recorded import SERVERS, readings

from ems_vllm.config import load_config
from ems_vllm.doctor.live.reading import Reading
from ems_vllm.doctor.live.report import LiveReport, live_report

EMS = load_config({"recipe": "ems"})


def report_on(name, config=EMS):
    return live_report("http://recorded", readings(name), config)


@pytest.mark.parametrize(
    ("name", "regime", "helps"),
    [
        ("idle", "idle", "unknown"),
        ("long_prompts", "kv_bound", "yes"),
        ("long_answers", "kv_bound", "yes"),
        ("short_prompts", "preempting", "no"),
        ("prefill_bound", "prefill_bound", "no"),
        ("compute_bound", "compute_bound", "no"),
        ("room", "room", "no"),
        ("ems_fresh", "room", "on"),
        ("ems_room", "room", "on"),
        ("ems_full", "kv_bound", "on"),
    ],
)
def test_a_regime_is_told_from_the_others(name, regime, helps):
    found = report_on(name)
    assert (found.regime, found.helps) == (regime, helps)


def test_every_recorded_server_is_judged():
    judged = test_a_regime_is_told_from_the_others.pytestmark[0].args[1]
    assert {name for name, *_ in judged} == set(SERVERS)


def test_the_gain_is_that_of_the_plan():
    """3,000 tokens and 128 more: 196 blocks, of which a budget of 1,024 leaves 77 at most."""
    found = report_on("long_prompts").gain
    assert found["compressed_share"] == 1
    assert found["dense_blocks"] == pytest.approx((3000 + 128) / 16, rel=0.1)
    # Budget, window of 64 and what is generated until the answer ends.
    assert found["compressed_blocks"] == pytest.approx((1024 + 64 + 128) / 16 + 1, rel=0.02)
    assert found["dense_fit"] == 1023 // found["dense_blocks"]
    assert found["compressed_fit"] > 2 * found["dense_fit"]


def test_other_settings_are_reckoned_with():
    half = load_config({"recipe": "snapkv", "budget": 512})
    found = report_on("long_prompts", half)
    assert "--kv-compression snapkv" in " ".join(found.sentences)
    assert found.gain["compressed_blocks"] < report_on("long_prompts").gain["compressed_blocks"]


def test_short_prompts_are_said_to_gain_nothing():
    found = report_on("short_prompts")
    assert found.gain["freed_share"] == 0
    said = " ".join(found.sentences)
    assert "prompts of 309 tokens and answers of 500" in said
    assert "nothing would be compressed" in said
    assert "--kv-cache-dtype fp8" in said
    # With a smaller budget the same requests would be.
    small = report_on("short_prompts", load_config({"recipe": "ems", "budget": 128}))
    assert small.helps == "yes"


def test_answers_that_grow_are_reckoned_with():
    """Prompts of 200 tokens are below the budget, and with answers of 1,600 they exceed it."""
    found = report_on("long_answers")
    assert found.traffic["lengths"]["prompt_mean"] < 250
    assert found.gain["compressed_share"] == 1


def test_requests_that_ended_before_are_not_taken_for_those_that_run():
    first = readings("long_prompts")[0]
    found = live_report("http://recorded", [first, Reading(first.at + 1, first.page)], EMS)
    assert found.regime == "kv_bound"
    assert found.traffic["lengths"]["since_start"]
    assert "No request ended while the server was watched" in " ".join(found.sentences)


def test_what_a_compressing_server_did_is_said():
    found = report_on("ems_room")
    assert found.gain is None
    assert "Compression is on and works" in " ".join(found.sentences)
    # A budget of 256 of about 3,000.
    assert found.compressing["kept_share"] == pytest.approx(256 / 2936, rel=0.1)
    assert found.compressing["live_share"] < 0.5


def test_why_nothing_was_compressed_is_said():
    found = report_on("ems_fresh")
    fitted = found.compressing["requests"]["fitted"]
    said = " ".join(found.sentences)
    assert f"of {fitted:,} requests that have ended, {fitted:,} were never longer" in said


def test_the_report_can_be_read_again():
    for name in SERVERS:
        text = report_on(name).model_dump_json()
        assert LiveReport.model_validate_json(text).model_dump_json() == text
