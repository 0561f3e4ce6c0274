// SPDX-License-Identifier: Apache-2.0

#include <host/on_device.h>

#include "checks.h"
#include "ops.h"

namespace ems {

void key_moments(const Tensor& key_cache, const Tensor& block_table, const Tensor& num_entries,
                 const std::optional<Tensor>& cos_sin, bool is_neox, const Tensor& directions,
                 const std::optional<Tensor>& means, const std::optional<Tensor>& products) {
  const ArgumentChecks checks("key_moments", key_cache);
  KeyMomentsParams p{};
  p.dtype = checks.cache_dtype("key_cache", key_cache);
  p.key_cache =
      checks.cache("key_cache", key_cache, key_cache.scalar_type(), {kAny, kAny, kAny, kAny, kAny});
  p.num_layers = key_cache.size(0);
  p.num_kv_heads = key_cache.size(2);
  p.head_size = key_cache.size(4);
  p.num_rows = block_table.dim() > 0 ? block_table.size(0) : 0;
  p.block_table = checks.block_table("block_table", block_table, p.num_rows);
  p.num_entries = checks.row_values("num_entries", num_entries, p.num_rows);
  p.rotation = checks.rotation("cos_sin", cos_sin, is_neox, p.head_size);
  checks.tensor("directions", directions, ScalarType::Float,
                {p.num_layers, p.num_rows, p.num_kv_heads, p.head_size});
  p.directions = checks.head_rows<float>("directions", directions, ScalarType::Float, p.num_layers,
                                         p.num_rows, p.num_kv_heads);
  checks.require(means.has_value() == products.has_value(),
                 "means and products must be given together");
  if (means.has_value()) {
    p.means = checks.head_rows<float>("means", *means, ScalarType::Float, p.num_layers, p.num_rows,
                                      p.num_kv_heads);
    checks.same_length("means", *means, "directions", directions);
    p.products = checks.head_matrices<float>("products", *products, p.num_layers, p.num_rows,
                                             p.num_kv_heads, p.head_size);
  }
  on_device(
      checks, [&] { cpu::key_moments(p); },
      [&](const cuda::Stream& stream) { cuda::key_moments(p, stream); });
}

}  // namespace ems
