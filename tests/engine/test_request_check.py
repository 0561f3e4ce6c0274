# SPDX-License-Identifier: Apache-2.0
"""What the frontend refuses before a request reaches the engine."""

from types import SimpleNamespace
from unittest import mock

import pytest
from prometheus_client import REGISTRY
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.v1.engine.input_processor import InputProcessor

from ems_vllm.engine.frontend.request_check import check_prompt, check_request
from ems_vllm.patches.frontend import patch_input_processor

COMPRESSED = SimpleNamespace(
    additional_config={"kv_compression": {"recipe": "ems", "budget": 64}},
    model_config=SimpleNamespace(served_model_name="m"),
)
DENSE = SimpleNamespace(additional_config={})


async def growing_prompt():
    yield "a"


def params(**extra_args: object) -> SamplingParams:
    return SamplingParams(extra_args=extra_args or None)


def test_bad_extra_arguments_are_refused_with_the_parameter():
    with pytest.raises(VLLMValidationError, match=r"kv_budget=65 .* at most 64") as refusal:
        check_request(COMPRESSED, params(kv_budget=65))
    assert refusal.value.parameter == "vllm_xargs"


@pytest.mark.parametrize(
    ("extra_args", "reason"),
    [
        ({"kv_budget": 65}, "kv_budget"),
        ({"kv_ratio": 2}, "kv_ratio"),
        ({"kv_compression": "maybe"}, "kv_compression"),
        ({"kv_compression": "off", "kv_ratio": 0.5}, "kv_ratio"),
        ({"kv_protect": ["nobody"]}, "kv_protect"),
        ({"kv_bugdet": 1}, "misspelt"),
        ({f"mine_{at}": 1 for at in range(257)}, "too_many_keys"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_refused_requests_are_counted_by_reason(extra_args, reason):
    def count():
        labels = {"model_name": "m", "reason": reason}
        return REGISTRY.get_sample_value("ems_vllm:requests_refused_total", labels) or 0

    before = count()
    with pytest.raises(VLLMValidationError):
        check_request(COMPRESSED, params(**extra_args))
    assert count() == before + 1


def test_good_extra_arguments_and_other_servers_pass():
    check_request(COMPRESSED, params(kv_budget=64))
    check_request(COMPRESSED, params())
    check_request(DENSE, params(kv_budget=10**6))


def test_a_prompt_that_still_grows_is_refused_unless_the_request_opts_out():
    with pytest.raises(VLLMValidationError, match="streamed prompt"):
        check_prompt(COMPRESSED, growing_prompt(), params())
    check_prompt(COMPRESSED, growing_prompt(), params(kv_compression="off"))
    check_prompt(COMPRESSED, "a", params())
    check_prompt(DENSE, growing_prompt(), params())


class Passed(Exception):
    """The request went on into vLLM's own checks."""


def process(vllm_config: object, params: SamplingParams, **kwargs: object) -> None:
    """vLLM's InputProcessor, up to its first own step."""
    for patch in patch_input_processor.PATCHES:
        patch.apply()
    processor = mock.Mock(vllm_config=vllm_config, _validate_params=mock.Mock(side_effect=Passed))
    InputProcessor.process_inputs(processor, "id", "a", params, (), **kwargs)


def test_every_part_of_a_streamed_prompt_is_checked():
    """The parameters of a part count, not only those of the whole request."""
    with pytest.raises(VLLMValidationError, match=r"streamed prompt .* with every part of it"):
        process(COMPRESSED, params(), resumable=True)
    with pytest.raises(VLLMValidationError, match="kv_budget=65"):
        process(COMPRESSED, params(kv_budget=65), resumable=True)
    for vllm_config, extra_args, kwargs in (
        (COMPRESSED, {"kv_compression": "off"}, {"resumable": True}),
        (COMPRESSED, {}, {}),
        (DENSE, {}, {"resumable": True}),
    ):
        with pytest.raises(Passed):
            process(vllm_config, params(**extra_args), **kwargs)
