# SPDX-License-Identifier: Apache-2.0
"""A stream is passed on as it is but for its last chunk, and ends where its reader ends it."""

import asyncio
import json
from types import SimpleNamespace

import pytest

from ems_vllm.engine.frontend.usage import Usage, noted, noting, with_usage
from ems_vllm.engine.holding import Holding, attach_holding
from ems_vllm.patches.frontend import patch_output_processor

# A text that looks like the end of a stream.
TEXT = 'data: {"id":"1","choices":[{"index":0,"text":"\\"choices\\":[],\\"usage\\":{}"}]}\n\n'
LAST = 'data: {"id":"1","choices":[],"usage":{"total_tokens":7},"name":"é"}\n\n'
NO_USAGE = 'data: {"id":"1","choices":[],"usage":null}\n\n'
DONE = "data: [DONE]\n\n"


async def events(*texts):
    for text in texts:
        yield text


def read(stream):
    async def collect():
        return [event async for event in stream]

    return asyncio.run(collect())


def test_only_the_last_chunk_is_written_anew():
    found = read(with_usage(events(TEXT, NO_USAGE, LAST, DONE), Usage("ems")))
    assert found[:2] + found[3:] == [TEXT, NO_USAGE, DONE]
    assert found[2].endswith("\n\n")
    assert "é" in found[2]
    chunk = json.loads(found[2].removeprefix("data: "))
    held = chunk["usage"].pop("kv_compression")
    assert held == {"recipe": "ems", "tokens": 0, "entries": 0, "compactions": 0}
    assert chunk == json.loads(LAST.removeprefix("data: "))


def test_an_error_is_passed_on():
    error = SimpleNamespace(error="none")
    assert with_usage(error, Usage("ems")) is error
    assert not hasattr(error, "usage")


def test_outputs_outside_a_request_of_the_api_are_passed_on_themselves():
    outputs = events()
    assert noted(outputs) is outputs


@pytest.mark.parametrize("layer", ["outputs", "events"])
def test_closing_a_stream_closes_what_it_reads(layer):
    """That is how vLLM learns that a client has gone."""
    closed = []

    async def endless():
        try:
            while True:
                yield SimpleNamespace(outputs=[], request_id="1") if layer == "outputs" else TEXT
        finally:
            closed.append(layer)

    async def leave():
        if layer == "outputs":
            with noting(Usage("ems")):
                stream = noted(endless())
        else:
            stream = with_usage(endless(), Usage("ems"))
        await anext(stream)
        await stream.aclose()
        assert closed == [layer]

    asyncio.run(leave())


@pytest.mark.parametrize("is_ours", [True, False], ids=["ours", "a connector's"])
def test_parameters_of_a_connector_are_passed_on_and_ours_are_not(is_ours):
    """An engine without compression may have one, in the same process."""
    message = SimpleNamespace(kv_transfer_params={"remote_block_ids": [1]})
    if is_ours:
        attach_holding(message, Holding(num_compactions=1, num_entries_gone=96.0))
    state = SimpleNamespace(
        parent_req=None,
        request_index=0,
        prompt_len=120,
        detokenizer=SimpleNamespace(num_output_tokens=lambda: 8),
    )

    def original(state, token_ids, pooled, finish_reason, stop_reason, kv_transfer_params):
        completion = SimpleNamespace(index=0)
        return SimpleNamespace(outputs=[completion], kv_transfer_params=kv_transfer_params)

    (patch,) = patch_output_processor.PATCHES
    make_request_output = patch.wrap(original)
    output = make_request_output(state, [1], None, None, None, message.kv_transfer_params)
    assert output.kv_transfer_params == (None if is_ours else {"remote_block_ids": [1]})
    held = output.outputs[0].kv_compression
    assert (held.num_tokens, held.num_entries) == (128, 32 if is_ours else 128)
