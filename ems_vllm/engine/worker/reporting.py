# SPDX-License-Identifier: Apache-2.0
"""Sends the report of a step along with its output."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput

from ems_vllm.engine.report import attach_report

if TYPE_CHECKING:
    from ems_vllm.engine.report import StepReport
    from ems_vllm.engine.worker.step import StepRunner


def report_steps(runner: Any, compression: StepRunner) -> None:
    """Have the output of every step say what the step kept, and what was measured.

    vLLM's runners give it out when tokens are sampled, after `execute_model`, and it may be read
    later, when it has reached the host.

    Args:
        runner: vLLM's GPUModelRunner, of version 1 or 2.
        compression: Of its worker.
    """
    sample_tokens = runner.sample_tokens

    @functools.wraps(sample_tokens)
    def sample_and_report(*args: Any, **kwargs: Any) -> Any:
        return _reporting(sample_tokens(*args, **kwargs), compression.take_report())

    runner.sample_tokens = sample_and_report


def _reporting(output: Any, report: StepReport | None) -> Any:
    if report is None:
        return output
    if isinstance(output, AsyncModelRunnerOutput):

        def get_and_report() -> ModelRunnerOutput:
            # The class's own again: an output that refers to itself, and its pinned memory, would
            # be there until the next garbage collection.
            del output.get_output
            found = output.get_output()
            attach_report(found, report)
            return found

        # Of this object alone: which class it has is the runner's affair.
        output.get_output = get_and_report
    else:
        attach_report(output, report)
    return output
