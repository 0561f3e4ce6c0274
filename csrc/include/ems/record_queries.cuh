// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "ems/device.cuh"
#include "ems/params.h"
#include "ems/vector.h"

namespace ems {

constexpr int kRecordThreads = 128;

// CTA x: token x, moved as bytes; the dtype does not matter.
template <typename T>
EMS_KERNEL(kRecordThreads, 1)
record_queries_kernel(RecordQueriesParams p) {
  const int64_t token = device::cta_x();
  const int64_t slot = p.ring_slots[token];
  if (slot < 0) return;
  const int64_t vectors_per_head = p.head_size * static_cast<int64_t>(sizeof(T)) / 16;
  for (int64_t i = device::thread_index(); i < p.num_heads * vectors_per_head;
       i += kRecordThreads) {
    const int64_t head = i / vectors_per_head;
    const int64_t vector = i % vectors_per_head;
    const auto* from = reinterpret_cast<const Vector16*>(p.query.at<const T>(token, head));
    auto* to = reinterpret_cast<Vector16*>(
        p.ring.at<T>(0, slot / p.ring.window, slot % p.ring.window, head));
    to[vector] = from[vector];
  }
}

}  // namespace ems
