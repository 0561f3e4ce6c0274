// SPDX-License-Identifier: Apache-2.0

#include <algorithm>
#include <limits>

#include "cpu/index_checks.h"
#include "launchers.h"

namespace ems::cpu {

void shift_block_tables(const ShiftBlockTablesParams& p) {
  const IndexChecks checks("shift_block_tables");
  const int64_t num_columns = p.block_table.num_columns;
  for (int64_t row = 0; row < p.num_rows; ++row) {
    checks.in_range("first_columns", row, p.first_columns[row], 0,
                    std::numeric_limits<int32_t>::max() / p.block_size);
  }
  for (int64_t row = 0; row < p.num_rows; ++row) {
    const int64_t first = std::min<int64_t>(p.first_columns[row], num_columns);
    const int32_t* in = p.block_table.data + row * p.block_table.row_stride;
    int32_t* out = p.out_block_table + row * p.out_row_stride;
    std::copy(in + first, in + num_columns, out);
    std::fill(out + num_columns - first, out + num_columns, 0);
    p.out_seq_lens[row] =
        static_cast<int32_t>(p.seq_lens[row] - p.first_columns[row] * p.block_size);
  }
}

}  // namespace ems::cpu
