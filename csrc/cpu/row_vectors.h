// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "ems/items.h"
#include "ems/paged_kv.h"

namespace ems::cpu {

// Vectors of one kv_head of one row, read in the order of entries. Blocks lie anywhere, and waiting
// for memory would take longer than most of what is done with a vector: so the one in the same slot
// of the next block is requested.
template <typename T>
class RowVectors {
 public:
  RowVectors(const PagedTensor& cache, const BlockTable& table, const Item& item,
             int64_t num_entries, int64_t head_size)
      : cache_(cache),
        table_(table),
        item_(item),
        num_columns_((num_entries + cache.block_size - 1) / cache.block_size),
        vector_bytes_(head_size * static_cast<int64_t>(sizeof(T))) {}

  const T* at(int64_t entry) {
    if (block_ == nullptr || entry < first_ || entry >= first_ + cache_.block_size) {
      seek(entry / cache_.block_size);
    }
    const int64_t offset = (entry - first_) * cache_.slot_stride;
    const auto* ahead = reinterpret_cast<const char*>(next_ + offset);
    for (int64_t i = 0; i < vector_bytes_; i += kLineBytes) __builtin_prefetch(ahead + i);
    return block_ + offset;
  }

 private:
  static constexpr int64_t kLineBytes = 64;

  void seek(int64_t column) {
    first_ = column * cache_.block_size;
    block_ = block(column);
    next_ = column + 1 < num_columns_ ? block(column + 1) : block_;
  }

  const T* block(int64_t column) const {
    return cache_.slot<const T>(item_.layer, table_.at(item_.row, column), item_.head, 0);
  }

  const PagedTensor& cache_;
  const BlockTable& table_;
  Item item_;
  int64_t num_columns_;
  int64_t vector_bytes_;
  // Of the block that was read last: its first entry, and where it and the one after it lie.
  int64_t first_ = 0;
  const T* block_ = nullptr;
  const T* next_ = nullptr;
};

}  // namespace ems::cpu
