// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "ems/device.cuh"
#include "ems/params.h"

namespace ems {

constexpr int kHeadPagesThreads = 128;

// CTA (x, y): row x, kv_head y. Indices are not checked here, but none leads beyond a table: a
// place that does not exist is no work, a column that does not exist is left out, and a length ends
// with the columns that there are for it.
inline EMS_KERNEL(kHeadPagesThreads, 1) head_pages_kernel(HeadPagesParams p) {
  const int64_t row = device::cta_x();
  const int64_t head = device::cta_y();
  const int64_t out_row = row * p.num_kv_heads + head;
  const int64_t seq_len = p.seq_lens[row];
  const int64_t place = p.places[row];
  if (seq_len <= 0 || place < 0 || place >= p.num_places) {
    if (device::thread_index() == 0) p.out_seq_lens[out_row] = 0;
    return;
  }
  const int32_t* starts = p.page_starts + place * p.place_stride;
  const int64_t first = starts[head];
  const int64_t end = starts[head + 1];
  const int64_t num_own = end > first ? end - first : 0;
  const int64_t num_dealt = starts[p.num_kv_heads] / static_cast<int32_t>(p.num_kv_heads);
  const int64_t behind = seq_len - num_dealt * p.block_size;
  const int64_t len = (behind > 0 ? behind : 0) + num_own * p.block_size;
  const int64_t max_len = p.num_out_columns * p.block_size;
  const int64_t out_len = len < max_len ? len : max_len;
  if (device::thread_index() == 0) p.out_seq_lens[out_row] = static_cast<int32_t>(out_len);

  const int64_t num_live = (out_len + p.block_size - 1) / p.block_size;
  const auto num_heads = static_cast<uint32_t>(p.num_kv_heads);
  int32_t* out = p.out_block_table + out_row * p.out_row_stride;
  for (int64_t i = device::thread_index(); i < num_live; i += kHeadPagesThreads) {
    // In 32 bits, where division is quick, and unsigned: what is negative is out of range, too.
    const bool is_own = i < num_own;
    const auto page = static_cast<uint32_t>(first + i);
    const uint32_t column =
        is_own ? page / num_heads : static_cast<uint32_t>(num_dealt + i - num_own);
    const uint32_t slot = is_own ? page - column * num_heads : static_cast<uint32_t>(head);
    if (column >= p.block_table.num_columns) continue;
    out[i] = static_cast<int32_t>(p.block_table.at(row, column) * p.num_kv_heads + slot);
  }
}

}  // namespace ems
