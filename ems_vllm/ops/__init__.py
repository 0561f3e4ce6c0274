# SPDX-License-Identifier: Apache-2.0
"""The operators of the compression, on paged KV caches.

Every operator writes its outputs in place and returns nothing. Conventions they share:

- A cache is [num_blocks, num_kv_heads, block_size, head_size], with a leading num_layers where all
  layers are handled in one call. Only the last dimension must be contiguous: K and V may be
  interleaved in one tensor, and heads and slots may be swapped in memory.
- Entry e of row r lies in block block_table[r, e // block_size], slot e % block_size. Columns that
  hold no entry of the row are never read.
- Float inputs are float32, bfloat16 or float16, the same for all of one call; sums are float32.
  A cache may be float8_e4m3fn instead (on a GPU not with float32 queries). Its scale, one for a
  whole tensor, matters to scores only: cosines, weighted means, and unit directions with a
  centre's norm do not change when all vectors are multiplied by the same positive number.
- Query head g belongs to kv_head g // (num_heads / num_kv_heads).
- A row without work (length 0) is allowed.

The definitions by example are in ems_vllm.ops.reference, one file per operator.
"""

import torch

from ems_vllm.ops.library import operators

__all__ = [
    "assign_classes",
    "head_pages",
    "merge_compact",
    "plan_metadata",
    "record_queries",
    "score_queries",
    "score_window",
    "select_entries",
]


def score_queries(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    block_table: torch.Tensor,
    query_starts: torch.Tensor,
    query_lens: torch.Tensor,
    seq_lens: torch.Tensor,
    accumulate_lens: torch.Tensor,
    score_table: torch.Tensor,
    lse: torch.Tensor | None,
    scale: float,
    sample_stride: int,
    scores: torch.Tensor,
) -> None:
    """Add the attention that a batch of queries pays to every key, summed over the queries.

    Paper: EMS, 2024, arXiv:2412.08521 (global score: column sums of the attention matrix).
    Deviation: query heads are averaged within the group of their kv_head.

    Query i of row r sits at position seq_lens[r] - query_lens[r] + i and sees the keys up to and
    including its own. The share of key j in its softmax, averaged over the group and summed over
    i, is added to the score of j if j < accumulate_lens[r], and replaces it otherwise. Chunks of
    one prompt therefore add up when accumulate_lens is the length already scored.

    With a sample_stride s > 1 (ours), only one block of 64 query positions in every s scores, and
    what it adds counts s times. Which one depends on the position alone, so chunks sample the same
    queries however a prompt is cut.

    Args:
        query: [num_tokens, num_heads, head_size], float.
        key_cache: [num_blocks, num_kv_heads, block_size, head_size], float - holds the keys of
            these queries too.
        block_table: [num_rows, num_columns], int32.
        query_starts: [num_rows], int32 - index of the row's first query in `query`.
        query_lens: [num_rows], int32 - queries of the row.
        seq_lens: [num_rows], int32 - keys of the row, its queries' own included.
        accumulate_lens: [num_rows], int32 - leading positions whose score is added to.
        score_table: [num_rows, num_score_columns], int32 - pages of `scores`; no page appears
            twice.
        lse: [num_tokens, num_heads], float32, or None - log of the softmax denominator (natural
            log, scale included) as attention kernels return it; None computes it.
            Needed for sampled queries only.
        scale: factor on the dot products before the softmax; the scale of a float8 cache is part
            of it.
        sample_stride: 1..16.
        scores: [num_pages, num_kv_heads, block_size], float32 - higher is kept.
    Mutates:
        scores: the slots of positions 0..seq_lens[r]-1 of every row; no other slot.
    Raises:
        RuntimeError: a shape, dtype, device or stride is not as above; on the CPU also when an
            index or a length is out of range.
    Note: no host sync; deterministic, whatever the number of threads; workspace of num_tokens *
        num_heads floats when lse is None, never a square one.
    """
    operators().score_queries(
        query,
        key_cache,
        block_table,
        query_starts,
        query_lens,
        seq_lens,
        accumulate_lens,
        score_table,
        lse,
        scale,
        sample_stride,
        scores,
    )


def score_window(
    ring: torch.Tensor,
    ring_rows: torch.Tensor,
    num_queries: torch.Tensor,
    end_positions: torch.Tensor,
    key_cache: torch.Tensor,
    block_table: torch.Tensor,
    live_lens: torch.Tensor,
    num_entries: torch.Tensor,
    scale: float,
    scores: torch.Tensor,
    key_scales: torch.Tensor | None = None,
    peaks: torch.Tensor | None = None,
) -> None:
    """Score entries by the attention of the last queries, which a ring buffer holds.

    Paper: SnapKV, 2024, arXiv:2404.14469 (observation window), without its pooling. Deviation:
    query heads are averaged within the group of their kv_head.

    The query of age k (0 is the newest) of row r lies at ring[:, ring_rows[r],
    (end_positions[r] - 1 - k) % obs_window] and sees live entries 0..live_lens[r]-1-k. A query
    that sees nothing adds nothing.

    Args:
        ring: [num_layers, num_ring_rows, obs_window, num_heads, head_size], float.
        ring_rows: [num_rows], int32 - the row's place in the ring.
        num_queries: [num_rows], int32 - queries to use, <= obs_window and <= end_positions.
        end_positions: [num_rows], int32 - one more than the position of the newest query.
        key_cache: [num_layers, num_blocks, num_kv_heads, block_size, head_size], float, or
            float8_e4m3fn.
        block_table: [num_rows, num_columns], int32 - its column 0 holds entry 0.
        live_lens: [num_rows], int32 - entries the newest query sees.
        num_entries: [num_rows], int32 - entries to score, <= live_lens and <= max_entries.
        scale: factor on the dot products before the softmax.
        scores: [num_layers, num_rows, num_kv_heads, max_entries], float32 - higher is kept.
        key_scales: [num_layers], float32, or None - what stored keys are multiplied with; 1 each
            where None.
        peaks: like scores, or None - the most attention that an entry receives from a single query
            of a single query head (ours).
    Mutates:
        scores, peaks: all of them; 0 beyond num_entries.
    Raises:
        RuntimeError: a shape, dtype, device or stride is not as above; on the CPU also when an
            index or a length is out of range.
    Note: no host sync; deterministic, whatever the number of threads.
    """
    operators().score_window(
        ring,
        ring_rows,
        num_queries,
        end_positions,
        key_cache,
        block_table,
        live_lens,
        num_entries,
        scale,
        scores,
        key_scales,
        peaks,
    )


def record_queries(query: torch.Tensor, ring_slots: torch.Tensor, ring: torch.Tensor) -> None:
    """Copy the queries of a batch into the ring buffer of the last queries of every request.

    Args:
        query: [num_tokens, num_heads, head_size], float.
        ring_slots: [num_tokens], int64 - ring row * obs_window + place in the window; negative
            for a token that is not recorded. No slot appears twice.
        ring: [num_ring_rows, obs_window, num_heads, head_size], float - one layer's ring.
    Mutates:
        ring: the slots named by ring_slots, bit for bit; no other slot.
    Raises:
        RuntimeError: a shape, dtype, device or stride is not as above; on the CPU also when a slot
            lies beyond the ring.
    Note: no host sync and no allocation, so CUDA graphs can capture it; deterministic.
    """
    operators().record_queries(query, ring_slots, ring)


def select_entries(
    scores: torch.Tensor,
    num_entries: torch.Tensor,
    budgets: torch.Tensor,
    num_protected: torch.Tensor,
    merge_limits: torch.Tensor,
    mass_limit: float,
    kept_idx: torch.Tensor,
    merge_idx: torch.Tensor,
) -> None:
    """Select, for every kv_head, the entries that stay and those that are merged into them.

    Paper: EMS, 2024, arXiv:2412.08521 (class centres, to-be-merged and irrelevant tokens). The
    limits on the to-be-merged ones are ours.

    Entries are ranked: the first num_protected in their order, then the others by descending
    score, ties to the lower index. The first budgets[r] stay. Those that follow are merged, at
    most merge_limits[r], and as long as the scores of all ranks up to and including an entry sum
    to at most mass_limit of the total. Everything else is dropped.

    Args:
        scores: [num_layers, num_rows, num_kv_heads, max_entries], float32 - finite and >= 0;
            higher is kept.
        num_entries: [num_rows], int32 - entries of the row, <= max_entries.
        budgets: [num_rows], int32 - entries to keep, num_protected..num_entries.
        num_protected: [num_rows], int32 - leading entries that are kept whatever their score.
        merge_limits: [num_rows], int32 - entries to merge at most, <= max_merges.
        mass_limit: share of the total score that kept and merged entries may reach; 1 or more is
            no limit.
        kept_idx: [num_layers, num_rows, num_kv_heads, max_budget], int32.
        merge_idx: [num_layers, num_rows, num_kv_heads, max_merges], int32 - max_merges may be 0.
    Mutates:
        kept_idx: entries in ascending order, then -1.
        merge_idx: entries in order of rank, then -1.
    Raises:
        RuntimeError: a shape, dtype, device or stride is not as above; on the CPU also when a
            count is out of range.
    Note: no host sync; deterministic; sums of scores in float64.
    """
    operators().select_entries(
        scores,
        num_entries,
        budgets,
        num_protected,
        merge_limits,
        mass_limit,
        kept_idx,
        merge_idx,
    )


def assign_classes(
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    kept_idx: torch.Tensor,
    merge_idx: torch.Tensor,
    budgets: torch.Tensor,
    num_protected: torch.Tensor,
    similarity_threshold: float,
    class_idx: torch.Tensor,
) -> None:
    """Assign every entry to be merged to the kept entry it is most redundant with.

    Paper: EMS, 2024, arXiv:2412.08521 (redundancy of a pair, zero class for what fits nowhere).
    The threshold is ours.

    The redundancy of entries t and c is max(cos(k_t, k_c), 0) * max(cos(v_t, v_c), 0), where the
    cosine with a zero vector is 0. Ties go to the lower rank. Protected entries take no members.

    Args:
        key_cache: [num_layers, num_blocks, num_kv_heads, block_size, head_size], float.
        value_cache: like key_cache.
        block_table: [num_rows, num_columns], int32.
        kept_idx: [num_layers, num_rows, num_kv_heads, max_budget], int32 - from select_entries.
        merge_idx: [num_layers, num_rows, num_kv_heads, max_merges], int32 - from select_entries.
        budgets: [num_rows], int32 - valid ranks of kept_idx.
        num_protected: [num_rows], int32 - entries below this index take no members.
        similarity_threshold: least redundancy of a member.
        class_idx: [num_layers, num_rows, num_kv_heads, max_merges], int32.
    Mutates:
        class_idx: rank of the class centre in kept_idx, or budgets[r], the zero class, for an
            entry below the threshold and where merge_idx is -1.
    Raises:
        RuntimeError: a shape, dtype, device or stride is not as above; on the CPU also when an
            index is out of range.
    Note: no host sync; deterministic, whatever the number of threads.
    """
    operators().assign_classes(
        key_cache,
        value_cache,
        block_table,
        kept_idx,
        merge_idx,
        budgets,
        num_protected,
        similarity_threshold,
        class_idx,
    )


def merge_compact(
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    paged_scores: torch.Tensor | None,
    weights: torch.Tensor,
    carry: torch.Tensor | None,
    merges_keys: bool,
    mass_keys: torch.Tensor | None,
    block_table: torch.Tensor,
    kept_idx: torch.Tensor,
    merge_idx: torch.Tensor,
    class_idx: torch.Tensor,
    budgets: torch.Tensor,
    target_columns: torch.Tensor,
    rows_together: int = 1,
) -> None:
    """Merge members into their class centres and write the classes to the target columns.

    Paper: EMS, 2024, arXiv:2412.08521 (keys merge in direction and keep the centre's norm, values
    merge as a weighted mean). The mass is ours.

    Class b of row r has the centre c = kept_idx[b] and the members merge_idx[t] with class_idx[t]
    == b. It is written to column target_columns[r] + b // block_size, slot b % block_size, of the
    same kv_head, as if everything of the row's group were read before anything of it is written; a
    group is rows_together consecutive rows, from row 0 on:

        value = (w_c v_c + sum w_t v_t) / w,  w = w_c + sum w_t
        key   = k_c, or with merges_keys |k_c| d / |d|,  d = w_c k_c / |k_c| + sum w_t k_t / |k_t|
                plus log(min(w / w_c, 1 + number of members)) * mass_key

    A softmax over kept entries alone gives a class the attention of its centre. What all its
    entries received is w / w_c times that: a constant on the logit, which no attention kernel
    takes. A mass_key m with q m * scale = 1 for the queries to come adds it to the key instead.

    A class without members is its centre, bit for bit; so is one where w <= 0, or with merges_keys
    |k_c| = 0 or |d| = 0. A member with a zero key adds no direction. Members of the zero class,
    budgets[r], vanish.

    Args:
        key_cache: [num_layers, num_blocks, num_kv_heads, block_size, head_size], float.
        value_cache: like key_cache.
        paged_scores: [num_layers, num_pages, num_kv_heads, block_size], float32, or None - scores
            by cache block; needs carry.
        weights: [num_layers, num_rows, num_kv_heads, max_entries], float32 - weight of an entry.
        carry: [num_layers, num_rows, num_kv_heads, max_entries], float32, or None - score of an
            entry; a class has the sum of its entries' scores.
        merges_keys: whether keys are merged too.
        mass_keys: [num_layers, num_rows, num_kv_heads, head_size], float32, or None - what is added
            to a key that shall receive e times the attention, in the units of stored keys.
        block_table: [num_rows, num_columns], int32 - a block of a target column is no other row's
            target, and no source of a row outside of the group.
        kept_idx: [num_layers, num_rows, num_kv_heads, max_budget], int32 - from select_entries.
        merge_idx: [num_layers, num_rows, num_kv_heads, max_merges], int32 - from select_entries.
        class_idx: [num_layers, num_rows, num_kv_heads, max_merges], int32 - from assign_classes.
        budgets: [num_rows], int32 - valid ranks of kept_idx.
        target_columns: [num_rows], int32 - first column to write to.
        rows_together: rows of a group, which share blocks; divides num_rows.
    Mutates:
        key_cache, value_cache: slots 0..budgets[r]-1 from the target column on; no other slot.
        paged_scores: the same slots.
    Raises:
        RuntimeError: a shape, dtype, device or stride is not as above, only one of paged_scores
            and carry is given, or rows_together is below 1 or does not divide num_rows; on the CPU
            also when an index is out of range; on a GPU also when a group has more than 65535
            kv_heads.
    Workspace: on a GPU at most 32 MiB, or what a group takes if that is more: `merge_scratch_bytes`
        of engine/worker/memory.py. On a CPU the merged classes of a group, for every thread.
    Note: no host sync; deterministic: members are added in the order of merge_idx.
    """
    operators().merge_compact(
        key_cache,
        value_cache,
        paged_scores,
        weights,
        carry,
        merges_keys,
        mass_keys,
        block_table,
        kept_idx,
        merge_idx,
        class_idx,
        budgets,
        target_columns,
        rows_together,
    )


def plan_metadata(
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    first_columns: torch.Tensor,
    block_size: int,
    out_block_table: torch.Tensor,
    out_seq_lens: torch.Tensor,
) -> None:
    """Shift block tables and sequence lengths past the columns that were given back.

    Args:
        block_table: [num_rows, num_columns], int32.
        seq_lens: [num_rows], int32.
        first_columns: [num_rows], int32 - columns that were given back, >= 0.
        block_size: tokens per block.
        out_block_table: [num_rows, num_columns], int32 - not the same memory as block_table.
        out_seq_lens: [num_rows], int32.
    Mutates:
        out_block_table: column c is column c + first_columns[r] of block_table, 0 beyond its end.
        out_seq_lens: seq_lens[r] - first_columns[r] * block_size.
    Raises:
        RuntimeError: a shape, dtype, device or stride is not as above.
    Note: no host sync and no allocation, so CUDA graphs can capture it; deterministic.
    """
    operators().plan_metadata(
        block_table, seq_lens, first_columns, block_size, out_block_table, out_seq_lens
    )


def head_pages(
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    places: torch.Tensor,
    page_starts: torch.Tensor,
    block_size: int,
    out_block_table: torch.Tensor,
    out_seq_lens: torch.Tensor,
) -> None:
    """Give every kv_head of every request a block table of its own, of pages that it owns (ours).

    A page is the slots that one kv_head has in one block: that of kv_head h in block b has number
    b * num_kv_heads + h, its place in the view [num_blocks * num_kv_heads, 1, block_size,
    head_size] of a cache. Attention over that view takes every request and kv_head as a request
    with one kv_head.

    The pages of the first B columns of a request are dealt to its kv_heads: page j lies in column
    j // num_kv_heads, slot j % num_kv_heads, and kv_head h owns pages page_starts[h] to
    page_starts[h + 1] - 1 and fills them. Of a column from B on, every kv_head has its own slot.

    Args:
        block_table: [num_rows, num_columns], int32.
        seq_lens: [num_rows], int32 - entries of the row as columns hold them: B * block_size and
            those behind; 0 or less for a row that pads a batch, whose place is not looked at.
        places: [num_rows], int32 - row of page_starts.
        page_starts: [num_places, num_kv_heads + 1], int32 - first page of every kv_head, from 0
            on and ascending, and B * num_kv_heads, the number of pages; all 0 where none is dealt.
        block_size: tokens per block.
        out_block_table: [num_rows * num_kv_heads, num_out_columns], int32 - not the same memory as
            block_table.
        out_seq_lens: [num_rows * num_kv_heads], int32.
    Mutates:
        out_seq_lens: of row r * num_kv_heads + h, block_size for every page that kv_head h owns
            and max(0, seq_lens[r] - B * block_size) more; 0 where the row pads.
        out_block_table: the columns of these entries: pages that the kv_head owns, in order, then
            its pages of columns B, B + 1 and so on. No other column.
    Raises:
        RuntimeError: a shape, dtype, device or stride is not as above; on the CPU also when an
            index is out of range, page_starts is not as above, or columns are too few, of either
            table. On a GPU lengths end with the columns of out_block_table, and what is out of
            range is not written.
    Note: no host sync and no allocation, so CUDA graphs can capture it; deterministic.
    """
    operators().head_pages(
        block_table, seq_lens, places, page_starts, block_size, out_block_table, out_seq_lens
    )
