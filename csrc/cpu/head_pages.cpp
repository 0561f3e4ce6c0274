// SPDX-License-Identifier: Apache-2.0

#include <algorithm>
#include <limits>

#include "cpu/index_checks.h"
#include "launchers.h"

namespace ems::cpu {
namespace {

constexpr int64_t kMaxInt32 = std::numeric_limits<int32_t>::max();

// What the kv_heads of a row that has entries share.
struct Deal {
  const int32_t* starts;  // [num_kv_heads + 1]
  int64_t num_dealt;      // columns whose pages are dealt to heads
  int64_t tail_len;       // entries in the columns behind those
  int64_t num_columns;    // all

  Deal(const HeadPagesParams& p, int64_t row)
      : starts(p.page_starts + p.places[row] * p.place_stride),
        num_dealt(starts[p.num_kv_heads] / p.num_kv_heads),
        tail_len(std::max<int64_t>(p.seq_lens[row] - num_dealt * p.block_size, 0)),
        num_columns(num_dealt + (tail_len + p.block_size - 1) / p.block_size) {}

  int64_t len(const HeadPagesParams& p, int64_t head) const {
    return tail_len + (starts[head + 1] - starts[head]) * p.block_size;
  }
};

void check_row(const HeadPagesParams& p, int64_t row) {
  const IndexChecks checks("head_pages");
  const int64_t num_heads = p.num_kv_heads;
  const int64_t place = p.places[row];
  checks.in_range("seq_lens", row, p.seq_lens[row], 0, p.block_table.num_columns * p.block_size);
  checks.in_range("places", row, place, 0, p.num_places - 1);
  const int32_t* starts = p.page_starts + place * p.place_stride;
  checks.in_range("page_starts", place, 0, starts[0], 0, 0);
  const int64_t max_pages = p.block_table.num_columns * num_heads;
  for (int64_t head = 1; head <= num_heads; ++head) {
    checks.in_range("page_starts", place, head, starts[head], starts[head - 1], max_pages);
  }
  checks.multiple_of("page_starts", place, num_heads, starts[num_heads], num_heads);
  const Deal deal(p, row);
  const int64_t max_len = std::min(p.num_out_columns * p.block_size, kMaxInt32);
  for (int64_t head = 0; head < num_heads; ++head) {
    checks.in_range("out_seq_lens", row * num_heads + head, deal.len(p, head), 0, max_len);
  }
  // Page numbers are int32, too.
  checks.blocks("block_table", p.block_table, row, 0, deal.num_columns,
                (kMaxInt32 + 1) / num_heads);
}

void fill_row(const HeadPagesParams& p, int64_t row) {
  const int64_t num_heads = p.num_kv_heads;
  int32_t* out_lens = p.out_seq_lens + row * num_heads;
  const Deal deal(p, row);
  const auto page_number = [&](int64_t column, int64_t slot) {
    return static_cast<int32_t>(p.block_table.at(row, column) * num_heads + slot);
  };
  for (int64_t head = 0; head < num_heads; ++head) {
    int32_t* out = p.out_block_table + (row * num_heads + head) * p.out_row_stride;
    for (int64_t page = deal.starts[head]; page < deal.starts[head + 1]; ++page) {
      *out++ = page_number(page / num_heads, page % num_heads);
    }
    for (int64_t column = deal.num_dealt; column < deal.num_columns; ++column) {
      *out++ = page_number(column, head);
    }
    out_lens[head] = static_cast<int32_t>(deal.len(p, head));
  }
}

}  // namespace

void head_pages(const HeadPagesParams& p) {
  for (int64_t row = 0; row < p.num_rows; ++row) {
    if (p.seq_lens[row] > 0) check_row(p, row);
  }
  for (int64_t row = 0; row < p.num_rows; ++row) {
    if (p.seq_lens[row] > 0) {
      fill_row(p, row);
    } else {
      std::fill_n(p.out_seq_lens + row * p.num_kv_heads, p.num_kv_heads, 0);
    }
  }
}

}  // namespace ems::cpu
