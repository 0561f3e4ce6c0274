// SPDX-License-Identifier: Apache-2.0

#include "ems/launch.cuh"
#include "ems/shift_block_tables.cuh"
#include "launchers.h"

namespace ems::cuda {

void shift_block_tables(const ShiftBlockTablesParams& p, const Stream& stream) {
  launch("shift_block_tables", shift_block_tables_kernel, {p.num_rows}, kShiftThreads, 0,
         stream.handle, p);
}

}  // namespace ems::cuda
