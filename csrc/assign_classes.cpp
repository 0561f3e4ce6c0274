// SPDX-License-Identifier: Apache-2.0

#include <host/on_device.h>

#include "checks.h"
#include "ops.h"

namespace ems {

void assign_classes(const Tensor& key_cache, const Tensor& value_cache, const Tensor& block_table,
                    const Tensor& kept_idx, const Tensor& merge_idx, const Tensor& budgets,
                    const Tensor& num_protected, double similarity_threshold,
                    const Tensor& class_idx) {
  const ArgumentChecks checks("assign_classes", key_cache);
  AssignClassesParams p{};
  p.dtype = checks.cache_dtype("key_cache", key_cache);
  const ScalarType dtype = key_cache.scalar_type();
  p.key_cache = checks.cache("key_cache", key_cache, dtype, {kAny, kAny, kAny, kAny, kAny});
  p.num_layers = key_cache.size(0);
  p.num_kv_heads = key_cache.size(2);
  p.head_size = key_cache.size(4);
  p.value_cache = checks.cache(
      "value_cache", value_cache, dtype,
      {p.num_layers, p.key_cache.num_blocks, p.num_kv_heads, p.key_cache.block_size, p.head_size});

  p.num_rows = block_table.dim() > 0 ? block_table.size(0) : 0;
  p.block_table = checks.block_table("block_table", block_table, p.num_rows);
  p.kept_idx = checks.head_rows<const int32_t>("kept_idx", kept_idx, ScalarType::Int, p.num_layers,
                                               p.num_rows, p.num_kv_heads);
  p.merge_idx = checks.head_rows<const int32_t>("merge_idx", merge_idx, ScalarType::Int,
                                                p.num_layers, p.num_rows, p.num_kv_heads);
  p.budgets = checks.row_values("budgets", budgets, p.num_rows);
  p.num_protected = checks.row_values("num_protected", num_protected, p.num_rows);
  p.similarity_threshold = static_cast<float>(similarity_threshold);
  p.class_idx = checks.head_rows<int32_t>("class_idx", class_idx, ScalarType::Int, p.num_layers,
                                          p.num_rows, p.num_kv_heads);
  checks.same_length("class_idx", class_idx, "merge_idx", merge_idx);
  on_device(
      checks, [&] { cpu::assign_classes(p); },
      [&](const cuda::Stream& stream) { cuda::assign_classes(p, stream); });
}

}  // namespace ems
