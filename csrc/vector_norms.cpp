// SPDX-License-Identifier: Apache-2.0

#include <host/on_device.h>

#include "checks.h"
#include "ops.h"

namespace ems {

void vector_norms(const Tensor& cache, const Tensor& block_table, const Tensor& num_entries,
                  const Tensor& norms) {
  const ArgumentChecks checks("vector_norms", cache);
  VectorNormsParams p{};
  p.dtype = checks.cache_dtype("cache", cache);
  p.cache = checks.cache("cache", cache, cache.scalar_type(), {kAny, kAny, kAny, kAny, kAny});
  p.num_layers = cache.size(0);
  p.num_kv_heads = cache.size(2);
  p.head_size = cache.size(4);
  p.num_rows = block_table.dim() > 0 ? block_table.size(0) : 0;
  p.block_table = checks.block_table("block_table", block_table, p.num_rows);
  p.num_entries = checks.row_values("num_entries", num_entries, p.num_rows);
  p.norms = checks.head_rows<float>("norms", norms, ScalarType::Float, p.num_layers, p.num_rows,
                                    p.num_kv_heads);
  on_device(
      checks, [&] { cpu::vector_norms(p); },
      [&](const cuda::Stream& stream) { cuda::vector_norms(p, stream); });
}

}  // namespace ems
