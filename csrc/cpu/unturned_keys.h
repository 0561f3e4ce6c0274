// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/aligned.h"
#include "cpu/row_vectors.h"
#include "cpu/simd.h"
#include "dispatch.h"
#include "ems/items.h"
#include "ems/params.h"

namespace ems::cpu {

// Keys of one kv_head of one row, as floats: as stored, and as they were before RoPE.
template <typename T, typename PARAMS>
class UnturnedKeys {
 public:
  UnturnedKeys(const PARAMS& p, const Item& item)
      : p_(p),
        vectors_(p.key_cache, p.block_table, item, p.num_entries[item.row], p.head_size),
        angles_(2 * p.rotation.num_pairs) {}

  void load(int64_t entry, float* out) { convert(vectors_.at(entry), p_.head_size, 1.0f, out); }

  // In place, of the key at a position.
  void turn_back(int64_t position, float* key) {
    const KeyRotation& rotation = p_.rotation;
    if (rotation.num_pairs == 0 || !rotation.knows(position)) return;
    dispatch_dtype(rotation.dtype, [&](auto element) {
      const auto* table = static_cast<const decltype(element)*>(rotation.cos_sin);
      convert(table + position * rotation.position_stride, angles_.size(), 1.0f, angles_.data());
    });
    const float* cos = angles_.data();
    simd().turn_back(cos, cos + rotation.num_pairs, rotation.num_pairs, rotation.is_neox, key);
  }

 private:
  const PARAMS& p_;
  RowVectors<T> vectors_;
  Floats angles_;
};

}  // namespace ems::cpu
