// SPDX-License-Identifier: Apache-2.0

#include <host/on_device.h>

#include "checks.h"
#include "ops.h"

namespace ems {

void shift_block_tables(const Tensor& block_table, const Tensor& seq_lens,
                        const Tensor& first_columns, int64_t block_size,
                        const Tensor& out_block_table, const Tensor& out_seq_lens) {
  const ArgumentChecks checks("shift_block_tables", block_table);
  ShiftBlockTablesParams p{};
  p.num_rows = block_table.dim() > 0 ? block_table.size(0) : 0;
  p.block_table = checks.block_table("block_table", block_table, p.num_rows);
  p.seq_lens = checks.row_values("seq_lens", seq_lens, p.num_rows);
  p.first_columns = checks.row_values("first_columns", first_columns, p.num_rows);
  checks.require(block_size >= 1, "block_size must be at least 1, got ", block_size);
  p.block_size = block_size;
  checks.tensor("out_block_table", out_block_table, ScalarType::Int,
                {p.num_rows, p.block_table.num_columns});
  p.out_block_table = static_cast<int32_t*>(out_block_table.mutable_data_ptr());
  p.out_row_stride = out_block_table.stride(0);
  checks.tensor("out_seq_lens", out_seq_lens, ScalarType::Int, {p.num_rows});
  p.out_seq_lens = static_cast<int32_t*>(out_seq_lens.mutable_data_ptr());
  on_device(
      checks, [&] { cpu::shift_block_tables(p); },
      [&](const cuda::Stream& stream) { cuda::shift_block_tables(p, stream); });
}

}  // namespace ems
