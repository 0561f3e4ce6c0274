// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

// When a request is compacted, into which block-table columns, and which prompt queries score.
//
// The plan is a pure function of the prompt length, the number of processed tokens and the
// configuration. The scheduler alone evaluates it, and tells the workers what falls due; it is C++
// because that happens for every request in every step.
//
// Columns of a request with n processed tokens (one column per block_size positions):
//
//     0 ......... first-1 | first ........ tail-1 | tail ......... n / block_size
//     freed               | budget_blocks columns | the newest tokens, as they were computed
//
// tail moves in steps of recompress_interval from a start that depends on the prompt alone, so both
// columns never go back.
//
// With a prefill_interval a prompt is compacted while it is still being processed, too: for the
// first time when so many tokens more have been than are kept, and then after every so many. All
// of it lies before the compaction at the prompt's end, which there always is.
namespace ems {

constexpr int64_t kNoLimit = -1;

struct PlanParams {
  int64_t prompt_len;
  int64_t block_size;           // >= 1
  int64_t budget_blocks;        // 0: the request is never compressed
  int64_t recent_window;        // newest tokens that are never compressed
  int64_t recompress_interval;  // tokens, a multiple of block_size; 0: not while decoding
  int64_t min_blocks_saved;     // >= 1; a first compaction that frees less is not worth its loss
  int64_t global_queries;    // last queries before a compaction of the prompt that score; kNoLimit:
                             // all computed ones
  int64_t prefill_interval;  // tokens, a multiple of block_size; 0: not before the prompt's end
  int64_t prefill_budget_blocks;  // >= budget_blocks; the most that any level of layers keeps
};

struct Columns {
  int64_t first;  // 0: nothing has been compressed
  int64_t tail;
};

constexpr bool operator==(const Columns& a, const Columns& b) {
  return a.first == b.first && a.tail == b.tail;
}

constexpr int64_t ceil_div(int64_t numerator, int64_t denominator) {
  return (numerator + denominator - 1) / denominator;
}

// The tail column at the end of the prompt: whole blocks that lie before the recent window.
constexpr int64_t prompt_tail(const PlanParams& p) {
  return p.prompt_len > p.recent_window ? (p.prompt_len - p.recent_window) / p.block_size : 0;
}

constexpr bool compresses_prompt(const PlanParams& p) {
  return p.budget_blocks > 0 && prompt_tail(p) - p.budget_blocks >= p.min_blocks_saved;
}

constexpr bool may_compress(const PlanParams& p) {
  return compresses_prompt(p) || (p.budget_blocks > 0 && p.recompress_interval > 0);
}

// The smallest first column that a compaction of a prompt too short to compress may have. Blocks of
// such a prompt are shared through the prefix cache, so its targets must lie beyond the prompt.
constexpr int64_t min_late_first(const PlanParams& p) {
  const int64_t prompt_columns = ceil_div(p.prompt_len, p.block_size);
  return prompt_columns > p.min_blocks_saved ? prompt_columns : p.min_blocks_saved;
}

// Completed recompression intervals since the end of the prompt.
constexpr int64_t num_recompressions(const PlanParams& p, int64_t num_processed) {
  if (p.recompress_interval == 0) return 0;
  const int64_t beyond = num_processed - p.recent_window - prompt_tail(p) * p.block_size;
  return beyond > 0 ? beyond / p.recompress_interval : 0;
}

// Processed tokens at which the compaction number `index` within the prompt falls due, from 1 on.
// It moves the tail to (prefill_budget_blocks * block_size + index * prefill_interval) /
// block_size.
constexpr int64_t due_within_prompt(const PlanParams& p, int64_t index) {
  const int64_t window_blocks = ceil_div(p.recent_window, p.block_size);
  return (p.prefill_budget_blocks + window_blocks) * p.block_size + index * p.prefill_interval;
}

// How many compactions there are within the prompt. They are the same for all levels of layers, and
// leave at least a block for the one at the prompt's end.
constexpr int64_t num_within_prompt(const PlanParams& p) {
  if (p.prefill_interval == 0 || p.budget_blocks == 0) return 0;
  if (prompt_tail(p) - p.prefill_budget_blocks < p.min_blocks_saved) return 0;
  const int64_t beyond = p.prompt_len - p.block_size - due_within_prompt(p, 0);
  return beyond > 0 ? beyond / p.prefill_interval : 0;
}

// Those of them that have fallen due.
constexpr int64_t num_within_prompt_at(const PlanParams& p, int64_t num_processed) {
  const int64_t most = num_within_prompt(p);
  if (most == 0 || num_processed < due_within_prompt(p, 1)) return 0;
  const int64_t due = (num_processed - due_within_prompt(p, 0)) / p.prefill_interval;
  return due < most ? due : most;
}

constexpr Columns columns_within_prompt(const PlanParams& p, int64_t index) {
  if (index == 0) return {0, 0};
  const int64_t tail = p.prefill_budget_blocks + index * (p.prefill_interval / p.block_size);
  return {tail - p.budget_blocks, tail};
}

// Columns that hold before a step that starts with num_processed tokens runs its forward pass.
constexpr Columns columns_at(const PlanParams& p, int64_t num_processed) {
  if (p.budget_blocks == 0) return {0, 0};
  if (num_processed < p.prompt_len) {
    return columns_within_prompt(p, num_within_prompt_at(p, num_processed));
  }
  const int64_t steps = num_recompressions(p, num_processed);
  const int64_t tail = prompt_tail(p) + steps * (p.recompress_interval / p.block_size);
  const int64_t first = tail - p.budget_blocks;
  if (compresses_prompt(p)) return {first, tail};
  if (steps >= 1 && first >= min_late_first(p)) return {first, tail};
  return {0, 0};
}

// Leading tokens that may be shared with other requests: the longest prefix-cache hit that may be
// taken, and the columns that may be hashed while the request runs. kNoLimit when it is never
// compressed.
constexpr int64_t max_shared_tokens(const PlanParams& p) {
  if (num_within_prompt(p) > 0) return columns_within_prompt(p, 1).first * p.block_size;
  if (compresses_prompt(p)) return (prompt_tail(p) - p.budget_blocks) * p.block_size;
  if (may_compress(p)) return p.prompt_len / p.block_size * p.block_size;
  return kNoLimit;
}

// Upper bound of the columns a decoding request holds: those of num_processed tokens and the next
// one, less what the step before gave back. The step that compacts may still be running, so the
// columns it gives back still count.
constexpr int64_t max_live_columns(const PlanParams& p, int64_t num_processed) {
  const int64_t held = num_processed / p.block_size + 1;
  return num_processed == 0 ? held : held - columns_at(p, num_processed - 1).first;
}

// The smallest number of processed tokens above num_processed at which columns_at changes, or
// kNoLimit when it never does.
constexpr int64_t next_compaction(const PlanParams& p, int64_t num_processed) {
  if (compresses_prompt(p) && num_processed < p.prompt_len) {
    const int64_t index = num_within_prompt_at(p, num_processed);
    return index < num_within_prompt(p) ? due_within_prompt(p, index + 1) : p.prompt_len;
  }
  if (!may_compress(p) || p.recompress_interval == 0) return kNoLimit;
  int64_t steps = num_recompressions(p, num_processed) + 1;
  if (!compresses_prompt(p)) {
    const int64_t missing = min_late_first(p) + p.budget_blocks - prompt_tail(p);
    const int64_t first_steps = ceil_div(missing, p.recompress_interval / p.block_size);
    steps = steps > first_steps ? steps : first_steps;
  }
  return p.recent_window + prompt_tail(p) * p.block_size + steps * p.recompress_interval;
}

// Position of the first query that scores for the compaction of the prompt that comes next. A
// limited number of them lies behind every hit that may be taken, so which queries score does not
// depend on what others have computed.
constexpr int64_t first_scored_query(const PlanParams& p, int64_t num_processed) {
  if (!compresses_prompt(p)) return 0;
  const int64_t index = num_within_prompt_at(p, num_processed);
  const int64_t always_computed = index > 0 ? due_within_prompt(p, index) : max_shared_tokens(p);
  if (p.global_queries == kNoLimit) return index > 0 ? always_computed : 0;
  const int64_t wanted = next_compaction(p, num_processed) - p.global_queries;
  return wanted > always_computed ? wanted : always_computed;
}

// Upper bound of the columns that computing num_tokens known tokens in chunks takes, as after a
// preemption: every chunk ends where a compaction falls due, and what the compaction at its start
// gives back still counts until the next chunk begins.
constexpr int64_t max_replay_columns(const PlanParams& p, int64_t num_tokens) {
  const int64_t dense = ceil_div(num_tokens, p.block_size);
  const int64_t once = next_compaction(p, 0);
  if (once == kNoLimit || once >= num_tokens) return dense;
  const int64_t twice = next_compaction(p, once);
  if (twice == kNoLimit || twice >= num_tokens) return dense;
  const int64_t before = ceil_div(twice, p.block_size);
  const bool is_within_prompt = num_within_prompt(p) > 0;
  const int64_t kept = is_within_prompt ? p.prefill_budget_blocks : p.budget_blocks;
  int64_t interval = p.recompress_interval;
  if (is_within_prompt && p.prefill_interval > interval) interval = p.prefill_interval;
  const int64_t after = kept + ceil_div(p.recent_window + 2 * interval, p.block_size) + 1;
  int64_t most = before > after ? before : after;
  if (p.recompress_interval == 0) {
    // All that comes after the prompt stays, and so may what its last compaction gives back.
    const int64_t kept_since = columns_within_prompt(p, num_within_prompt(p)).first;
    if (dense - kept_since > most) most = dense - kept_since;
  }
  return most < dense ? most : dense;
}

}  // namespace ems
