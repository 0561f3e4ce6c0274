// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "ems/device.cuh"
#include "ems/params.h"

namespace ems {

constexpr int kShiftThreads = 128;

// CTA x: row x.
inline EMS_KERNEL(kShiftThreads, 1) shift_block_tables_kernel(ShiftBlockTablesParams p) {
  const int64_t row = device::cta_x();
  const int64_t first = p.first_columns[row];
  const int64_t num_columns = p.block_table.num_columns;
  for (int64_t column = device::thread_index(); column < num_columns; column += kShiftThreads) {
    const int64_t source = column + first;
    p.out_block_table[row * p.out_row_stride + column] =
        source < num_columns ? static_cast<int32_t>(p.block_table.at(row, source)) : 0;
  }
  if (device::thread_index() == 0) {
    p.out_seq_lens[row] = static_cast<int32_t>(p.seq_lens[row] - first * p.block_size);
  }
}

}  // namespace ems
