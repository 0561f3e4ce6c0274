// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cpu/index_checks.h"

namespace ems::cpu {

// Every entry that a selection names lies in a block of the row. Selections are mostly ascending,
// so a block is looked up once per run of entries that it holds.
template <typename PARAMS>
void check_selection(const char* op, const PARAMS& p, int64_t row, int64_t max_entries) {
  const IndexChecks checks(op);
  const int64_t block_size = p.key_cache.block_size;
  const auto check_entry = [&](const char* name, int64_t at, int64_t entry, int64_t* column) {
    checks.in_range(name, at, entry, 0, max_entries - 1);
    if (entry / block_size == *column) return;
    *column = entry / block_size;
    checks.blocks("block_table", p.block_table, row, *column, *column + 1, p.key_cache.num_blocks);
  };
  checks.in_range("budgets", row, p.budgets[row], 0, p.kept_idx.length);
  for (int64_t layer = 0; layer < p.num_layers; ++layer) {
    for (int64_t head = 0; head < p.num_kv_heads; ++head) {
      int64_t column = -1;
      const int32_t* kept = p.kept_idx.at(layer, row, head);
      for (int64_t i = 0; i < p.budgets[row]; ++i) check_entry("kept_idx", i, kept[i], &column);
      const int32_t* merged = p.merge_idx.at(layer, row, head);
      for (int64_t i = 0; i < p.merge_idx.length; ++i) {
        if (merged[i] != -1) check_entry("merge_idx", i, merged[i], &column);
      }
    }
  }
}

}  // namespace ems::cpu
