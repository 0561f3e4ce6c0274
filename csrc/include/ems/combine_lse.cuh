// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cmath>
#include <cstdint>

#include "ems/device.cuh"
#include "ems/lane_softmax.cuh"

// Log-sum-exps of queries whose keys several CTAs have shared, each a part.
namespace ems {

constexpr int kCombineThreads = 256;

// partial: [num_parts, num_queries], float32. Thread x: the log-sum-exp of one query over all
// parts, written to the first of them. Queries that do not exist combine garbage that nobody reads.
inline EMS_KERNEL(kCombineThreads, 1)
    combine_lse_kernel(int64_t num_queries, int32_t num_parts, float* partial) {
  const int64_t index = device::cta_x() * kCombineThreads + device::thread_index();
  if (index >= num_queries) return;
  float maximum = -INFINITY;
  for (int32_t part = 0; part < num_parts; ++part) {
    const float value = partial[part * num_queries + index];
    maximum = value > maximum ? value : maximum;
  }
  float sum = 0;
  for (int32_t part = 0; part < num_parts; ++part) {
    const float value = partial[part * num_queries + index];
    if (value > -INFINITY) sum += device::exp2_fast((value - maximum) * kLog2E);
  }
  partial[index] = maximum + device::log2_accurate(sum) * kLn2;
}

}  // namespace ems
