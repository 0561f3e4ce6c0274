// SPDX-License-Identifier: Apache-2.0

#include <host/on_device.h>

#include "checks.h"
#include "ops.h"

namespace ems {

void merge_compact(const Tensor& key_cache, const Tensor& value_cache,
                   const std::optional<Tensor>& accumulated_pages, const Tensor& weights,
                   const std::optional<Tensor>& carry, int64_t key_merge, bool sums_values,
                   const std::optional<Tensor>& mass_keys, const Tensor& block_table,
                   const Tensor& kept_idx, const Tensor& merge_idx, const Tensor& class_idx,
                   const Tensor& budgets, const Tensor& target_columns, int64_t rows_together) {
  const ArgumentChecks checks("merge_compact", key_cache);
  MergeCompactParams p{};
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
  checks.require(rows_together >= 1 && p.num_rows % rows_together == 0,
                 "rows_together must be at least 1 and divide the number of rows (", p.num_rows,
                 "), got ", rows_together);
  p.rows_together = rows_together;
  p.block_table = checks.block_table("block_table", block_table, p.num_rows);
  p.weights = checks.head_rows<const float>("weights", weights, ScalarType::Float, p.num_layers,
                                            p.num_rows, p.num_kv_heads);
  checks.require(accumulated_pages.has_value() == carry.has_value(),
                 "accumulated_pages and carry must be given together or not at all");
  if (accumulated_pages.has_value()) {
    p.accumulated_pages =
        checks.scores("accumulated_pages", *accumulated_pages,
                      {p.num_layers, kAny, p.num_kv_heads, p.key_cache.block_size});
    p.carry = checks.head_rows<const float>("carry", *carry, ScalarType::Float, p.num_layers,
                                            p.num_rows, p.num_kv_heads);
    checks.same_length("carry", *carry, "weights", weights);
  }
  checks.require(0 <= key_merge && key_merge <= static_cast<int64_t>(KeyMerge::kMean),
                 "key_merge must be 0, 1 or 2, got ", key_merge);
  p.key_merge = static_cast<KeyMerge>(key_merge);
  p.sums_values = sums_values;
  if (mass_keys.has_value()) {
    p.mass_keys = checks.head_rows<const float>("mass_keys", *mass_keys, ScalarType::Float,
                                                p.num_layers, p.num_rows, p.num_kv_heads);
    checks.require(p.mass_keys.length == p.head_size, "mass_keys must be as long as a key (",
                   p.head_size, "), got ", p.mass_keys.length);
  }
  p.kept_idx = checks.head_rows<const int32_t>("kept_idx", kept_idx, ScalarType::Int, p.num_layers,
                                               p.num_rows, p.num_kv_heads);
  p.merge_idx = checks.head_rows<const int32_t>("merge_idx", merge_idx, ScalarType::Int,
                                                p.num_layers, p.num_rows, p.num_kv_heads);
  p.class_idx = checks.head_rows<const int32_t>("class_idx", class_idx, ScalarType::Int,
                                                p.num_layers, p.num_rows, p.num_kv_heads);
  checks.same_length("class_idx", class_idx, "merge_idx", merge_idx);
  p.budgets = checks.row_values("budgets", budgets, p.num_rows);
  p.target_columns = checks.row_values("target_columns", target_columns, p.num_rows);
  on_device(
      checks, [&] { cpu::merge_compact(p); },
      [&](const cuda::Stream& stream) { cuda::merge_compact(p, stream); });
}

}  // namespace ems
