// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "ems/dtype.h"
#include "ems/macros.h"

// What RoPE did to the keys of a layer, so that it can be undone: Rotation of
// ems_vllm/policies/rotation.py.
namespace ems {

// Products of keys are taken around this key of a row, or its last: not the first, which tends to
// be unlike all others.
constexpr int64_t kOriginEntry = 15;

// Two dimensions of a key that turn with each other, if they turn.
struct KeyPair {
  int32_t first;
  int32_t second;
};

struct KeyRotation {
  const void* cos_sin;  // [num_positions, rotary_dim] dtype: cosines, then sines; nullable
  DType dtype;
  bool is_neox;
  int32_t num_pairs;  // rotary_dim / 2
  int64_t num_positions;
  int64_t position_stride;

  // Pairs of all dimensions: the first num_pairs turn, the others are what is left over.
  EMS_HOST_DEVICE KeyPair pair(int32_t index) const {
    if (is_neox && index < num_pairs) return {index, index + num_pairs};
    return {2 * index, 2 * index + 1};
  }

  // Keys at positions beyond the table are left as they are.
  EMS_HOST_DEVICE bool knows(int64_t position) const { return position < num_positions; }
};

}  // namespace ems
