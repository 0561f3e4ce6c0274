# SPDX-License-Identifier: Apache-2.0
"""The operators by PyTorch's own operations, vectorised as far as they allow.

What one would write without kernels; tests compare them with the operators. They take the
operators' arguments, but for rows that are all alike: one length, one budget.
"""

from __future__ import annotations

import torch
from torch.nn.functional import normalize

# Queries of a block of rows of the attention matrix.
_CHUNK = 256


def _entries(cache: torch.Tensor, block_table: torch.Tensor) -> torch.Tensor:
    """[num_layers, num_rows, num_kv_heads, num_columns * block_size, head_size]."""
    return cache[:, block_table.long()].transpose(2, 3).flatten(3, 4)


def _gather(entries: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return entries.gather(3, index.long()[..., None].expand(*index.shape, entries.shape[-1]))


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
    """Of whole prompts, all queries scoring."""
    num_rows, length = len(block_table), len(query) // len(block_table)
    num_kv_heads, block_size = key_cache.shape[1:3]
    keys = _entries(key_cache[None], block_table)[0, :, :, :length]
    queries = query.view(num_rows, length, num_kv_heads, -1, query.shape[-1]).permute(0, 2, 3, 1, 4)
    group = queries.shape[2]
    total = scores.new_zeros(num_rows, num_kv_heads, block_table.shape[1] * block_size)
    positions = torch.arange(length, device=query.device)
    for start in range(0, length, _CHUNK):
        end = min(start + _CHUNK, length)
        chunk = queries[:, :, :, start:end].flatten(2, 3)
        logits = (chunk @ keys[:, :, :end].transpose(2, 3)).float().mul_(scale)
        hidden = positions[:end] > positions[start:end, None]
        logits.unflatten(2, (group, -1)).masked_fill_(hidden, float("-inf"))
        total[:, :, :end] += logits.softmax(-1).sum(2) / group
    pages = total.unflatten(2, (-1, block_size)).transpose(1, 2)
    scores[score_table.long().flatten()] = pages.flatten(0, 1)


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
    key_scales: None,
    peaks: torch.Tensor,
) -> None:
    """With a full window that ends at the last entry, and keys as they are stored."""
    window, length = ring.shape[2], scores.shape[3]
    num_kv_heads = scores.shape[2]
    keys = _entries(key_cache, block_table)[..., :length, :]
    ages = torch.arange(window, device=ring.device)
    places = (end_positions[:, None] - 1 - ages) % window
    queries = ring[:, ring_rows.long()[:, None], places.long()]
    queries = queries.unflatten(3, (num_kv_heads, -1)).permute(0, 1, 3, 4, 2, 5)
    group = queries.shape[3]
    logits = (queries.flatten(3, 4) @ keys.transpose(3, 4)).float().mul_(scale)
    hidden = torch.arange(length, device=ring.device) >= length - ages[:, None]
    logits.unflatten(3, (group, -1)).masked_fill_(hidden, float("-inf"))
    attention = logits.softmax(-1)
    scores.copy_(attention.sum(3) / group)
    peaks.copy_(attention.amax(3))


def vector_norms(
    cache: torch.Tensor, block_table: torch.Tensor, num_entries: torch.Tensor, norms: torch.Tensor
) -> None:
    """In float32."""
    norms.copy_(_entries(cache, block_table)[..., : norms.shape[3], :].float().norm(dim=-1))


def key_moments(
    key_cache: torch.Tensor,
    block_table: torch.Tensor,
    num_entries: torch.Tensor,
    cos_sin: torch.Tensor,
    is_neox: bool,
    directions: torch.Tensor,
    means: torch.Tensor,
    products: torch.Tensor,
) -> None:
    """With a position for every entry and no more; in float32."""
    keys = _entries(key_cache, block_table)[..., : len(cos_sin), :].float()
    directions.copy_(normalize(keys, dim=-1).sum(3))
    keys = _turned_back(keys, cos_sin)
    means.copy_(keys.mean(3))
    keys -= means[..., None, :]
    torch.matmul(keys.mT, keys, out=products)


def key_scores(
    key_cache: torch.Tensor,
    block_table: torch.Tensor,
    num_entries: torch.Tensor,
    cos_sin: torch.Tensor,
    is_neox: bool,
    directions: torch.Tensor,
    distinctness: torch.Tensor,
    means: torch.Tensor,
    whitening: torch.Tensor,
    leverage: torch.Tensor,
) -> None:
    """Like key_moments."""
    keys = _entries(key_cache, block_table)[..., : len(cos_sin), :].float()
    cosines = normalize(keys, dim=-1) @ normalize(directions, dim=-1)[..., None]
    distinctness.copy_(cosines.squeeze(-1).neg_().add_(1).clamp_(min=0))
    keys = _turned_back(keys, cos_sin).sub_(means[..., None, :])
    leverage.copy_((keys @ whitening.mT).square_().sum(-1))


def _turned_back(keys: torch.Tensor, cos_sin: torch.Tensor) -> torch.Tensor:
    """Keys before RoPE, all of whose dimensions turn in halves."""
    cos, sin = cos_sin.float().chunk(2, dim=-1)
    first, second = keys.chunk(2, dim=-1)
    return torch.cat([first * cos + second * sin, second * cos - first * sin], dim=-1)


def record_queries(query: torch.Tensor, ring_slots: torch.Tensor, ring: torch.Tensor) -> None:
    """With a slot for every query."""
    ring.view(-1, *query.shape[1:]).index_copy_(0, ring_slots, query)


def rank_entries(
    scores: torch.Tensor,
    num_entries: torch.Tensor,
    num_protected: torch.Tensor,
    is_protected: None,
    share: float,
    first: int,
    weights: torch.Tensor,
) -> None:
    """Without a mask."""
    entries = torch.arange(scores.shape[3], device=scores.device)
    is_candidate = entries >= num_protected[:, None, None]
    ranked = scores.masked_fill(~is_candidate, -1.0)
    order = ranked.argsort(dim=-1, descending=True, stable=True)
    ranks = entries.float()
    claims = torch.where(ranks < first, ranks / max(first, 1), (ranks - first) / share + 1)
    by_rank = claims.add_(1).reciprocal_().expand_as(order)
    of_entry = torch.empty_like(weights).scatter_(3, order, by_rank)
    torch.maximum(weights, of_entry, out=weights).masked_fill_(~is_candidate, 1.0)


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
    """Without a limit on the mass."""
    budget, merges = kept_idx.shape[3], merge_idx.shape[3]
    entries = torch.arange(scores.shape[3], device=scores.device)
    ranked = scores.masked_fill(entries < num_protected[:, None, None], float("inf"))
    top = ranked.topk(budget + merges, sorted=True).indices
    kept_idx.copy_(top[..., :budget].sort().values)
    merge_idx.copy_(top[..., budget:])


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
    """In the dtype of the cache."""
    redundancy: torch.Tensor | float = 1.0
    for cache in (key_cache, value_cache):
        entries = _entries(cache, block_table)
        members, centres = (
            normalize(_gather(entries, index), dim=-1) for index in (merge_idx, kept_idx)
        )
        redundancy = redundancy * (members @ centres.transpose(3, 4)).clamp_(min=0)
    assert isinstance(redundancy, torch.Tensor)
    redundancy.masked_fill_((kept_idx < num_protected[:, None, None])[..., None, :], -1.0)
    best = redundancy.max(-1)
    zero_class = budgets[:, None, None].long()
    class_idx.copy_(torch.where(best.values >= similarity_threshold, best.indices, zero_class))


def merge_compact(
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    accumulated_pages: torch.Tensor | None,
    weights: torch.Tensor,
    carry: torch.Tensor | None,
    key_merge: int,
    sums_values: bool,
    mass_keys: torch.Tensor | None,
    block_table: torch.Tensor,
    kept_idx: torch.Tensor,
    merge_idx: torch.Tensor,
    class_idx: torch.Tensor,
    budgets: torch.Tensor,
    target_columns: torch.Tensor,
) -> None:
    """Without scores to carry, with mass, and without merging keys."""
    assert mass_keys is not None
    assert (key_merge, sums_values) == (0, False)
    block_size, budget = key_cache.shape[3], kept_idx.shape[3]
    ranks = torch.arange(budget, device=kept_idx.device)
    columns = target_columns[:, None] + ranks // block_size
    blocks = block_table.gather(1, columns.long())
    shares = [weights.gather(3, index.long())[..., None] for index in (kept_idx, merge_idx)]
    total = _with_zero_class(shares[0]).scatter_add_(3, class_idx.long()[..., None], shares[1])
    index = class_idx.long()[..., None]
    counts = torch.ones_like(total).scatter_add_(3, index, torch.ones_like(shares[1]))
    alone = counts == 1
    mass = (total[..., :budget, :] / shares[0]).minimum(counts[..., :budget, :]).log()
    for cache in (key_cache, value_cache):
        entries = _entries(cache, block_table)
        stored = _gather(entries, kept_idx)
        if cache is key_cache:
            merged = stored.float() + mass * mass_keys[..., None, :]
        else:
            merged = _with_zero_class(stored.float() * shares[0])
            classes = index.expand(*class_idx.shape, merged.shape[-1])
            members = _gather(entries, merge_idx).float() * shares[1]
            merged = merged.scatter_add_(3, classes, members)[..., :budget, :]
            merged = merged / total[..., :budget, :]
        result = torch.where(alone[..., :budget, :], stored, merged.to(cache.dtype))
        # [num_rows, budget, num_layers, num_kv_heads, head_size], as advanced indices put it.
        cache[:, blocks.long(), :, (ranks % block_size)[None]] = result.permute(1, 3, 0, 2, 4)


def _with_zero_class(classes: torch.Tensor) -> torch.Tensor:
    return torch.cat([classes, torch.zeros_like(classes[..., :1, :])], dim=3)


def shift_block_tables(
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    first_columns: torch.Tensor,
    block_size: int,
    out_block_table: torch.Tensor,
    out_seq_lens: torch.Tensor,
) -> None:
    """As the operator."""
    num_columns = block_table.shape[1]
    columns = torch.arange(num_columns, device=block_table.device) + first_columns[:, None]
    shifted = block_table.gather(1, columns.clamp(max=num_columns - 1).long())
    out_block_table.copy_(shifted.masked_fill_(columns >= num_columns, 0))
    out_seq_lens.copy_(seq_lens - first_columns * block_size)


def head_pages(
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    places: torch.Tensor,
    page_starts: torch.Tensor,
    block_size: int,
    out_block_table: torch.Tensor,
    out_seq_lens: torch.Tensor,
) -> None:
    """As the operator."""
    num_kv_heads = page_starts.shape[1] - 1
    starts = page_starts[places.long()]
    own = starts.diff()
    num_dealt = starts[:, -1:] // num_kv_heads
    tails = (seq_lens[:, None] - num_dealt * block_size).clamp_(min=0)
    lens = (tails + own * block_size).masked_fill_(seq_lens[:, None] <= 0, 0)
    out_seq_lens.copy_(lens.flatten())
    heads = torch.arange(num_kv_heads, device=starts.device)[:, None]
    columns = torch.arange(out_block_table.shape[1], device=starts.device)
    pages = starts[:, :-1, None] + columns
    is_own = columns < own[..., None]
    common = num_dealt[..., None] + columns - own[..., None]
    sources = torch.where(is_own, pages // num_kv_heads, common)
    sources = sources.clamp_(0, block_table.shape[1] - 1)
    blocks = block_table.gather(1, sources.flatten(1)).view_as(sources)
    numbers = blocks * num_kv_heads + torch.where(is_own, pages % num_kv_heads, heads)
    is_live = columns * block_size < lens[..., None]
    table = out_block_table.view_as(numbers)
    out_block_table.copy_(torch.where(is_live, numbers, table).flatten(0, 1))
