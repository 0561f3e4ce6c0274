# SPDX-License-Identifier: Apache-2.0
"""Types of the compiled module; csrc/python_bindings.cpp and csrc/plan.h define it."""

from typing import Any, final

def build_info() -> dict[str, Any]:
    """As ems_vllm.build_info, which says what is in it."""

@final
class CompressionPlan:
    """When a request is compacted, and into which block-table columns.

    Immutable, hashable and picklable. A pure function of its arguments, evaluated by the scheduler
    alone; the workers are told what falls due.

    Args:
        prompt_len: tokens of the prompt, also after a preemption.
        block_size: tokens per block, >= 1.
        budget_blocks: blocks that the compressed part occupies; 0 for a request that is never
            compressed.
        recent_window: newest tokens that are never compressed.
        recompress_interval: tokens between two compactions while decoding, a multiple of
            block_size; 0 compresses the prompt only.
        min_blocks_saved: a first compaction that frees fewer blocks is skipped, >= 1.
        global_queries: last queries before a compaction of the prompt that score its entries, >= 1;
            None for all that are computed.
        prefill_interval: tokens after which a prompt is compacted while it is processed, a multiple
            of block_size; 0 for not before its end.
        prefill_budget_blocks: the most that any level of layers keeps, >= budget_blocks; None where
            there is one level.
    Raises:
        ValueError: an argument is outside its range.
    """

    def __init__(
        self,
        *,
        prompt_len: int,
        block_size: int,
        budget_blocks: int,
        recent_window: int,
        recompress_interval: int,
        min_blocks_saved: int,
        global_queries: int | None = None,
        prefill_interval: int = 0,
        prefill_budget_blocks: int | None = None,
    ) -> None: ...
    @property
    def prompt_len(self) -> int: ...
    @property
    def block_size(self) -> int: ...
    @property
    def budget_blocks(self) -> int: ...
    @property
    def recent_window(self) -> int: ...
    @property
    def recompress_interval(self) -> int: ...
    @property
    def min_blocks_saved(self) -> int: ...
    @property
    def global_queries(self) -> int | None: ...
    @property
    def prefill_interval(self) -> int: ...
    @property
    def prefill_budget_blocks(self) -> int: ...
    @property
    def compresses_prompt(self) -> bool:
        """Whether there is a compaction at the end of the prompt."""

    @property
    def num_within_prompt(self) -> int:
        """Compactions before the one at the prompt's end."""

    @property
    def may_compress(self) -> bool:
        """Whether the request is compacted, now or if it grows long enough."""

    @property
    def max_shared_tokens(self) -> int | None:
        """Leading tokens that may be shared with other requests; None for no limit.

        The longest prefix-cache hit that may be taken, and the columns that may be hashed while
        the request runs.
        """

    def first_scored_query(self, num_processed: int = 0) -> int:
        """Position of the first query that scores for the next compaction of the prompt.

        0 where all do that are computed, and nothing has been compressed. With a limited number of
        queries none lies before max_shared_tokens, so a hit in the prefix cache changes nothing.
        """

    def columns(self, num_processed: int) -> tuple[int, int]:
        """(first, tail) before the forward pass of a step that starts with num_processed tokens.

        Compressed entries are in columns first..tail-1, columns before first are free. (0, 0):
        nothing has been compressed.
        """

    def max_live_columns(self, num_processed: int) -> int:
        """Upper bound of the columns a request that decodes token by token holds.

        Counts the slot of the next token, and the columns that the compaction of a step still
        running is about to give back.
        """

    def next_compaction(self, num_processed: int) -> int | None:
        """The smallest count above num_processed at which columns() changes; None for never."""

    def max_replay_columns(self, num_tokens: int) -> int:
        """Upper bound of the columns that computing num_tokens known tokens in chunks takes.

        As after a preemption, when every chunk ends where a compaction falls due.
        """

    def __eq__(self, other: object) -> bool: ...
    def __hash__(self) -> int: ...
