# SPDX-License-Identifier: Apache-2.0
"""Seeds on the CPU: random generators whose last draw can be taken back.

vLLM samples at the end of every prompt chunk, and takes the draw of a partial one back by moving
the offset of a CUDA generator. Generators of the CPU have no offset, so the state is kept instead.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

# By how much vLLM moves the offset for one draw.
_DRAW = 4


class RewindableGenerator(torch.Generator):
    """A generator of which `checkpoint` is called before every draw."""

    @classmethod
    def take_over(cls, generator: torch.Generator) -> RewindableGenerator:
        """One that goes on where `generator` is."""
        self = cls(generator.device)
        self.set_state(generator.get_state())
        return self

    def checkpoint(self) -> None:
        """The state that the next draw may be taken back to."""
        self._state = self.get_state()

    def get_offset(self) -> int:
        return _DRAW

    def set_offset(self, offset: int) -> torch.Generator:
        if offset != 0:
            raise ValueError(f"only the last draw can be taken back, not {_DRAW - offset} steps")
        return self.set_state(self._state)


def make_generators_rewindable(runner: GPUModelRunner) -> None:
    """Have a model runner (version 1) on the CPU take draws back as it does on a GPU."""
    sample = runner._sample

    def _sample(*args: Any, **kwargs: Any) -> Any:
        batch = runner.input_batch
        for row, generator in batch.generators.items():
            if not isinstance(generator, RewindableGenerator):
                generator = RewindableGenerator.take_over(generator)
                # The request keeps it when its row in the batch changes.
                runner.requests[batch.req_ids[row]].generator = generator
                batch.generators[row] = generator
            generator.checkpoint()
        return sample(*args, **kwargs)

    runner._sample = _sample
