// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "ems/macros.h"

namespace ems {

// One kv_head of one row in one layer: what a compaction treats on its own.
struct Item {
  int64_t layer;
  int64_t row;
  int64_t head;
};

// Items are numbered layer by layer, row by row.
template <typename PARAMS>
EMS_HOST_DEVICE Item item_at(const PARAMS& p, int64_t index) {
  return {index / p.num_kv_heads / p.num_rows, index / p.num_kv_heads % p.num_rows,
          index % p.num_kv_heads};
}

template <typename PARAMS>
EMS_HOST_DEVICE int64_t num_items(const PARAMS& p) {
  return p.num_layers * p.num_rows * p.num_kv_heads;
}

}  // namespace ems
