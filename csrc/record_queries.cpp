// SPDX-License-Identifier: Apache-2.0

#include <host/on_device.h>

#include "checks.h"
#include "ops.h"

namespace ems {

void record_queries(const Tensor& query, const Tensor& ring_slots, const Tensor& ring) {
  const ArgumentChecks checks("record_queries", query);
  RecordQueriesParams p{};
  p.dtype = checks.float_dtype("query", query);
  const ScalarType dtype = query.scalar_type();
  checks.tensor("query", query, dtype, {kAny, kAny, kAny});
  p.num_tokens = query.size(0);
  p.num_heads = query.size(1);
  p.head_size = query.size(2);
  p.query = {query.mutable_data_ptr(), query.stride(0), query.stride(1)};

  checks.tensor("ring_slots", ring_slots, ScalarType::Long, {p.num_tokens});
  p.ring_slots = static_cast<const int64_t*>(ring_slots.const_data_ptr());

  checks.tensor("ring", ring, dtype, {kAny, kAny, p.num_heads, p.head_size});
  p.ring = {ring.mutable_data_ptr(), ring.size(0),   ring.size(1),  0,
            ring.stride(0),          ring.stride(1), ring.stride(2)};
  on_device(
      checks, [&] { cpu::record_queries(p); },
      [&](const cuda::Stream& stream) { cuda::record_queries(p, stream); });
}

}  // namespace ems
