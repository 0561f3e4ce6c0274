// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cmath>

#include "ems/device.cuh"

namespace ems {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

// The factor from products to logits in units of log 2, for a scale >= 0. Never 0, which would make
// NaN of the -inf that hides a product; what the least makes of any product is as good as 0.
EMS_DEVICE float scale_to_log2(float scale) {
  constexpr float kSmallest = 1e-35f;
  return fmaxf(scale * kLog2E, kSmallest);
}

// The softmax denominator of one row as one lane sees it. Each of the four lanes that share the row
// keeps a maximum and a sum of its own columns; they meet at the end, not at every tile.
struct LaneSoftmax {
  float maximum = -INFINITY;
  float sum = 0;

  // Takes in the products of the row that this lane has, [j][2 * half] and [j][2 * half + 1], -inf
  // for a hidden one. scale_log2 > 0 makes logits of them, in units of log 2; as it keeps their
  // order, only the largest is multiplied on its own.
  template <int N>
  EMS_DEVICE void update(const float (&products)[N][4], int half, float scale_log2) {
    float largest = -INFINITY;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      largest = fmaxf(largest, fmaxf(products[j][2 * half], products[j][2 * half + 1]));
    }
    const float new_maximum = fmaxf(maximum, largest * scale_log2);
    // A lane that has seen nothing yet subtracts 0, not -inf.
    const float reference = new_maximum == -INFINITY ? 0.0f : new_maximum;
    sum *= device::exp2_fast(maximum - reference);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      sum += device::exp2_fast(products[j][2 * half] * scale_log2 - reference);
      sum += device::exp2_fast(products[j][2 * half + 1] * scale_log2 - reference);
    }
    maximum = new_maximum;
  }

  // The natural log of the denominator over the columns of all four lanes, given to each.
  EMS_DEVICE float lse_of_quad() const {
    float all_maximum = maximum;
    float all_sum = sum;
#pragma unroll
    for (int mask = 1; mask <= 2; mask *= 2) {
      const float other_maximum = device::shuffle_xor(all_maximum, mask);
      const float other_sum = device::shuffle_xor(all_sum, mask);
      const float merged = other_maximum > all_maximum ? other_maximum : all_maximum;
      const float reference = merged == -INFINITY ? 0.0f : merged;
      all_sum = all_sum * device::exp2_fast(all_maximum - reference) +
                other_sum * device::exp2_fast(other_maximum - reference);
      all_maximum = merged;
    }
    return (all_maximum + device::log2_accurate(all_sum)) * kLn2;
  }
};

}  // namespace ems
