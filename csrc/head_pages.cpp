// SPDX-License-Identifier: Apache-2.0

#include <host/on_device.h>

#include "checks.h"
#include "ops.h"

namespace ems {

void head_pages(const Tensor& block_table, const Tensor& seq_lens, const Tensor& places,
                const Tensor& page_starts, int64_t block_size, const Tensor& out_block_table,
                const Tensor& out_seq_lens) {
  const ArgumentChecks checks("head_pages", block_table);
  HeadPagesParams p{};
  p.num_rows = block_table.dim() > 0 ? block_table.size(0) : 0;
  p.block_table = checks.block_table("block_table", block_table, p.num_rows);
  p.seq_lens = checks.row_values("seq_lens", seq_lens, p.num_rows);
  p.places = checks.row_values("places", places, p.num_rows);
  checks.tensor("page_starts", page_starts, ScalarType::Int, {kAny, kAny});
  checks.require(page_starts.size(1) >= 2,
                 "page_starts must have at least 2 columns, one more than kv_heads, got ",
                 page_starts.size(1));
  p.num_places = page_starts.size(0);
  p.num_kv_heads = page_starts.size(1) - 1;
  p.page_starts = static_cast<const int32_t*>(page_starts.const_data_ptr());
  p.place_stride = page_starts.stride(0);
  checks.require(block_size >= 1, "block_size must be at least 1, got ", block_size);
  p.block_size = block_size;
  const int64_t num_out_rows = p.num_rows * p.num_kv_heads;
  checks.tensor("out_block_table", out_block_table, ScalarType::Int, {num_out_rows, kAny});
  p.out_block_table = static_cast<int32_t*>(out_block_table.mutable_data_ptr());
  p.num_out_columns = out_block_table.size(1);
  p.out_row_stride = out_block_table.stride(0);
  checks.tensor("out_seq_lens", out_seq_lens, ScalarType::Int, {num_out_rows});
  p.out_seq_lens = static_cast<int32_t*>(out_seq_lens.mutable_data_ptr());
  on_device(
      checks, [&] { cpu::head_pages(p); },
      [&](const cuda::Stream& stream) { cuda::head_pages(p, stream); });
}

}  // namespace ems
