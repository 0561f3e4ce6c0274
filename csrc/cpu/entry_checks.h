// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>

#include "cpu/index_checks.h"

namespace ems::cpu {

// The entries of every row lie in blocks of the row, and there are no more than `most` of them.
template <typename PARAMS>
void check_entries(const char* op, const PARAMS& p, const PagedTensor& cache, int64_t most) {
  const IndexChecks checks(op);
  const int64_t capacity = p.block_table.num_columns * cache.block_size;
  for (int64_t row = 0; row < p.num_rows; ++row) {
    checks.in_range("num_entries", row, p.num_entries[row], 0, std::min(capacity, most));
    checks.entries("block_table", p.block_table, row, p.num_entries[row], cache);
  }
}

}  // namespace ems::cpu
