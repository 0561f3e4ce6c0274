// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cmath>
#include <cstdint>

#include "ems/attention_sums.cuh"
#include "ems/cta.cuh"
#include "ems/items.h"
#include "ems/params.h"

namespace ems {

constexpr int kVectorNormThreads = 256;

// Offsets of the entries that each warp reads, one found by each lane: divisions by the block size
// would take longer than what is read.
struct VectorNormsShared {
  int64_t offsets[kVectorNormThreads];
};

// Lane of CTA (x, item): the norm of entry x * 256 + thread, for item first_item + y. The lanes of
// a warp read its 32 entries together, one after the other.
template <typename C, int HEAD_SIZE>
EMS_KERNEL(kVectorNormThreads, 4)
vector_norms_kernel(VectorNormsParams p, int64_t first_item) {
  auto& shared = device::shared_memory<VectorNormsShared>();
  const Item item = item_at(p, first_item + device::cta_y());
  const int thread = device::thread_index();
  const int lane = thread % device::kWarpSize;
  const int64_t* offsets = shared.offsets + (thread - lane);
  const int64_t entry = device::cta_x() * kVectorNormThreads + thread;
  const int64_t num_left = p.num_entries[item.row] - (entry - lane);
  const int count = num_left < device::kWarpSize ? static_cast<int>(num_left) : device::kWarpSize;

  const PagedKeys vectors{p.cache, p.block_table, item.layer, item.row, item.head};
  if (lane < count) shared.offsets[thread] = vectors.offset(entry);
  device::sync_warp();
  const auto* data = static_cast<const C*>(p.cache.data);
  float own = 0;
  // Several loads under way: nothing else hides how long memory takes.
#pragma unroll 4
  for (int i = 0; i < count; ++i) {
    float sum = 0;
#pragma unroll
    for (int d = lane; d < HEAD_SIZE; d += device::kWarpSize) {
      const float x = device::widen(data[offsets[i] + d]);
      sum += x * x;
    }
    sum = sum_of_warp(sum);
    if (i == lane) own = sum;
  }
  if (entry < p.norms.length) p.norms.at(item.layer, item.row, item.head)[entry] = sqrtf(own);
}

}  // namespace ems
