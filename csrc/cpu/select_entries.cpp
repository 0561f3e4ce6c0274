// SPDX-License-Identifier: Apache-2.0

// One item per layer, row and kv_head. Entries are ranked by integer keys whose ascending order is
// the rank: no comparison looks a score up, and ties break by themselves.

#include <algorithm>
#include <vector>

#include "cpu/index_checks.h"
#include "cpu/parallel.h"
#include "ems/numeric.h"
#include "launchers.h"

namespace ems::cpu {
namespace {

void check_indices(const SelectEntriesParams& p) {
  const IndexChecks checks("select_entries");
  for (int64_t row = 0; row < p.num_rows; ++row) {
    checks.in_range("num_entries", row, p.num_entries[row], 0, p.scores.length);
    checks.in_range("budgets", row, p.budgets[row], 0,
                    std::min<int64_t>(p.num_entries[row], p.kept_idx.length));
    checks.in_range("num_protected", row, p.num_protected[row], 0, p.budgets[row]);
    checks.in_range("merge_limits", row, p.merge_limits[row], 0, p.merge_idx.length);
  }
}

// Non-negative floats compare like their bits; adding 0 turns -0 into 0.
uint64_t rank_key(float score, int64_t entry) {
  return static_cast<uint64_t>(~bit_cast<uint32_t>(score + 0.0f)) << 32 |
         static_cast<uint32_t>(entry);
}

int32_t entry_of(uint64_t key) { return static_cast<int32_t>(key); }

void select_head(const SelectEntriesParams& p, const Item& item) {
  const int64_t layer = item.layer, row = item.row, head = item.head;
  const float* scores = p.scores.at(layer, row, head);
  const int64_t num_entries = p.num_entries[row];
  const int64_t budget = p.budgets[row];
  const int64_t num_protected = p.num_protected[row];
  const int64_t num_ranked = budget - num_protected;  // of the entries below, how many stay
  int32_t* kept = p.kept_idx.at(layer, row, head);
  int32_t* merged = p.merge_idx.at(layer, row, head);

  std::vector<uint64_t> keys(num_entries - num_protected);
  for (int64_t entry = num_protected; entry < num_entries; ++entry) {
    keys[entry - num_protected] = rank_key(scores[entry], entry);
  }
  const auto first_merge = keys.begin() + num_ranked;
  if (first_merge != keys.end()) std::nth_element(keys.begin(), first_merge, keys.end());

  for (int64_t entry = 0; entry < num_protected; ++entry) kept[entry] = entry;
  std::transform(keys.begin(), first_merge, kept + num_protected, entry_of);
  std::sort(kept + num_protected, kept + budget);
  std::fill(kept + budget, kept + p.kept_idx.length, -1);

  const int64_t limit = std::min<int64_t>(p.merge_limits[row], num_entries - budget);
  std::partial_sort(first_merge, first_merge + limit, keys.end());
  double total = 0;
  for (int64_t entry = 0; entry < num_entries; ++entry) total += scores[entry];
  double mass = 0;
  for (int64_t rank = 0; rank < budget; ++rank) mass += scores[kept[rank]];
  int64_t num_merged = 0;
  for (; num_merged < limit; ++num_merged) {
    const int32_t entry = entry_of(first_merge[num_merged]);
    mass += scores[entry];
    // At 1 there is no limit; comparing would let rounding drop the last entries.
    if (p.mass_limit < 1 && mass > p.mass_limit * total) break;
    merged[num_merged] = entry;
  }
  std::fill(merged + num_merged, merged + p.merge_idx.length, -1);
}

}  // namespace

void select_entries(const SelectEntriesParams& p) {
  check_indices(p);
  parallel_heads(p, [&](const Item& item) { select_head(p, item); });
}

}  // namespace ems::cpu
