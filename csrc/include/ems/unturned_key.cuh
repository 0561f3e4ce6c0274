// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "ems/cta.cuh"
#include "ems/device.cuh"
#include "ems/params.h"

namespace ems {

EMS_DEVICE float angle_at(const KeyRotation& rotation, int64_t index) {
  switch (rotation.dtype) {
    case DType::kBFloat16:
      return device::widen(static_cast<const BFloat16*>(rotation.cos_sin)[index]);
    case DType::kFloat16:
      return device::widen(static_cast<const Float16*>(rotation.cos_sin)[index]);
    default:
      return static_cast<const float*>(rotation.cos_sin)[index];
  }
}

// A key, spread over the lanes of a warp in pairs of dimensions that RoPE turned together:
// neighbouring lanes hold neighbouring pairs, so that loads and stores are of whole sectors
// wherever the halves of a key begin.
template <int HEAD_SIZE>
struct UnturnedKey {
  static constexpr int kPairs = HEAD_SIZE / 2;
  static constexpr int kPerLane = (kPairs + device::kWarpSize - 1) / device::kWarpSize;

  // 0 in lanes that have no such pair.
  float first[kPerLane];
  float second[kPerLane];

  static EMS_DEVICE int pair_index(int i) {
    return i * device::kWarpSize + device::thread_index() % device::kWarpSize;
  }

  // Calls f(i, pair) for the pairs of this lane.
  template <typename F>
  static EMS_DEVICE void for_pairs(const KeyRotation& rotation, const F& f) {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      if (pair_index(i) < kPairs) f(i, rotation.pair(pair_index(i)));
    }
  }

  EMS_DEVICE void clear() {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) first[i] = second[i] = 0.0f;
  }

  // As it is stored.
  template <typename C>
  EMS_DEVICE void load(const KeyRotation& rotation, const C* key) {
    clear();
    for_pairs(rotation, [&](int i, KeyPair pair) {
      first[i] = device::widen(key[pair.first]);
      second[i] = device::widen(key[pair.second]);
    });
  }

  template <typename C>
  EMS_DEVICE void store(const KeyRotation& rotation, C* out) const {
    for_pairs(rotation, [&](int i, KeyPair pair) {
      out[pair.first] = first[i];
      out[pair.second] = second[i];
    });
  }

  EMS_DEVICE void turn_back(const KeyRotation& rotation, int64_t position) {
    if (!rotation.knows(position)) return;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      if (pair_index(i) >= rotation.num_pairs) continue;
      const int64_t index = position * rotation.position_stride + pair_index(i);
      const float cos = angle_at(rotation, index);
      const float sin = angle_at(rotation, index + rotation.num_pairs);
      const float turned = first[i];
      first[i] = turned * cos + second[i] * sin;
      second[i] = second[i] * cos - turned * sin;
    }
  }

  EMS_DEVICE void add(const UnturnedKey& other, float factor) {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      first[i] += factor * other.first[i];
      second[i] += factor * other.second[i];
    }
  }

  // The same in every lane.
  EMS_DEVICE float dot(const UnturnedKey& other) const {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      sum += first[i] * other.first[i] + second[i] * other.second[i];
    }
    return sum_of_warp(sum);
  }
};

}  // namespace ems
