// SPDX-License-Identifier: Apache-2.0

#include <cstring>

#include "cpu/index_checks.h"
#include "cpu/parallel.h"
#include "dispatch.h"
#include "launchers.h"

namespace ems::cpu {

void record_queries(const RecordQueriesParams& p) {
  const IndexChecks checks("record_queries");
  const int64_t num_slots = p.ring.num_ring_rows * p.ring.window;
  for (int64_t token = 0; token < p.num_tokens; ++token) {
    if (p.ring_slots[token] < 0) continue;
    checks.in_range("ring_slots", token, p.ring_slots[token], 0, num_slots - 1);
  }
  dispatch_dtype(p.dtype, [&](auto element) {
    using T = decltype(element);
    parallel_items(p.num_tokens, [&](int64_t token) {
      const int64_t slot = p.ring_slots[token];
      if (slot < 0) return;
      for (int64_t head = 0; head < p.num_heads; ++head) {
        T* target = p.ring.at<T>(0, slot / p.ring.window, slot % p.ring.window, head);
        std::memcpy(target, p.query.at<const T>(token, head), p.head_size * sizeof(T));
      }
    });
  });
}

}  // namespace ems::cpu
