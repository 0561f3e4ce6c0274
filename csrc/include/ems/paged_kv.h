// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "ems/macros.h"

// Addresses of paged and per-head data. All index arithmetic of the library is here, in 64 bits:
// block_id * block_stride exceeds 32 bits in caches of ordinary size.
namespace ems {

// Row r of a block table; columns without an entry of the row must not be read.
struct BlockTable {
  const int32_t* data;  // [num_rows, num_columns] int32
  int64_t num_columns;
  int64_t row_stride;

  EMS_HOST_DEVICE int64_t at(int64_t row, int64_t column) const {
    return data[row * row_stride + column];
  }
};

// A tensor addressed by block and slot: K cache, V cache or scores. Strides count elements. What
// one slot holds (a vector, or one score) is contiguous.
struct PagedTensor {
  void* data;  // [num_layers, num_blocks, num_kv_heads, block_size, ...]
  int64_t num_blocks;
  int64_t block_size;
  int64_t layer_stride;
  int64_t block_stride;
  int64_t head_stride;
  int64_t slot_stride;

  template <typename T>
  EMS_HOST_DEVICE T* slot(int64_t layer, int64_t block_id, int64_t head, int64_t offset) const {
    return static_cast<T*>(data) + layer * layer_stride + block_id * block_stride +
           head * head_stride + offset * slot_stride;
  }

  // Entry `entry` of a row of `table`.
  template <typename T>
  EMS_HOST_DEVICE T* entry(const BlockTable& table, int64_t row, int64_t layer, int64_t head,
                           int64_t entry) const {
    return slot<T>(layer, table.at(row, entry / block_size), head, entry % block_size);
  }
};

// Per-head vectors of a tensor [num_layers, num_rows, num_kv_heads, length]; the last dimension is
// contiguous.
template <typename T>
struct HeadRows {
  T* data;
  int64_t length;
  int64_t layer_stride;
  int64_t row_stride;
  int64_t head_stride;

  EMS_HOST_DEVICE T* at(int64_t layer, int64_t row, int64_t head) const {
    return data + layer * layer_stride + row * row_stride + head * head_stride;
  }
};

// Query vectors of a tensor [num_tokens, num_heads, head_size].
struct TokenHeads {
  void* data;
  int64_t token_stride;
  int64_t head_stride;

  template <typename T>
  EMS_HOST_DEVICE T* at(int64_t token, int64_t head) const {
    return static_cast<T*>(data) + token * token_stride + head * head_stride;
  }
};

// Query vectors of a ring buffer [num_layers, num_ring_rows, window, num_heads, head_size].
struct QueryRing {
  void* data;
  int64_t num_ring_rows;
  int64_t window;
  int64_t layer_stride;
  int64_t row_stride;
  int64_t place_stride;
  int64_t head_stride;

  template <typename T>
  EMS_HOST_DEVICE T* at(int64_t layer, int64_t ring_row, int64_t place, int64_t head) const {
    return static_cast<T*>(data) + layer * layer_stride + ring_row * row_stride +
           place * place_stride + head * head_stride;
  }
};

}  // namespace ems
