# SPDX-License-Identifier: Apache-2.0
"""What sequences hold in the cache, as users see it: `CompletionOutput.kv_compression`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ems_vllm.engine.holding import Holding

if TYPE_CHECKING:
    from vllm.outputs import RequestOutput
    from vllm.v1.engine.output_processor import RequestState

ATTRIBUTE = "kv_compression"


class SequenceHolding:
    """One sequence: the prompt of a request and one of its answers.

    Entries are those of a kv_head, in the mean of the compressed KV-cache groups. All outputs of a
    sequence share the object, so that what they are merged to shows the latest.

    Attributes:
        num_tokens: Its length.
    """

    def __init__(self) -> None:
        self.num_tokens = 0
        self._holding = Holding()

    @property
    def num_entries(self) -> float:
        """Entries that it holds; as many as tokens where nothing was compressed."""
        return self.num_tokens - self._holding.num_entries_gone

    @property
    def num_compactions(self) -> int:
        """Steps that compressed it, those after a preemption included."""
        return self._holding.num_compactions

    @property
    def num_entries_in(self) -> float:
        """Entries that they found, in all."""
        return self._holding.num_entries_in

    @property
    def num_entries_kept(self) -> float:
        """Entries that they kept, in all."""
        return self._holding.num_entries_kept

    def update(self, num_tokens: int, holding: Holding | None) -> None:
        """It has new tokens.

        Args:
            num_tokens: Its length now.
            holding: What came with them; None for nothing new.
        """
        self.num_tokens = num_tokens
        self._holding = holding or self._holding

    def __repr__(self) -> str:
        return (
            f"SequenceHolding(num_tokens={self.num_tokens}, num_entries={self.num_entries:g}, "
            f"num_compactions={self.num_compactions})"
        )


def note_holding(state: RequestState, holding: Holding | None) -> None:
    """A sequence has new tokens.

    Args:
        state: vLLM's, of the sequence.
        holding: What came with them; None for nothing new.
    """
    if state.detokenizer is not None:
        num_tokens = state.prompt_len + state.detokenizer.num_output_tokens()
        sequence = _holdings(state).setdefault(state.request_index, SequenceHolding())
        sequence.update(num_tokens, holding)


def show_holdings(state: RequestState, output: RequestOutput) -> None:
    """Give every sequence of an output what is known of it.

    Args:
        state: vLLM's, of one of them.
        output: Of its request.
    """
    holdings = _holdings(state)
    for completion in output.outputs:
        setattr(completion, ATTRIBUTE, holdings.get(completion.index))


def _holdings(state: RequestState) -> dict[int, SequenceHolding]:
    """Of all sequences of a request, by their index."""
    request = state if state.parent_req is None else state.parent_req
    found: dict[int, SequenceHolding] = request.__dict__.setdefault(ATTRIBUTE, {})
    return found
