// SPDX-License-Identifier: Apache-2.0

#include <host/on_device.h>

#include "checks.h"
#include "ops.h"

namespace ems {

void score_window(const Tensor& ring, const Tensor& ring_rows, const Tensor& num_queries,
                  const Tensor& end_positions, const Tensor& key_cache, const Tensor& block_table,
                  const Tensor& live_lens, const Tensor& num_entries, double scale,
                  const Tensor& scores, const std::optional<Tensor>& key_scales,
                  const std::optional<Tensor>& peaks) {
  const ArgumentChecks checks("score_window", ring);
  ScoreWindowParams p{};
  p.dtype = checks.float_dtype("ring", ring);
  const ScalarType dtype = ring.scalar_type();
  checks.tensor("ring", ring, dtype, {kAny, kAny, kAny, kAny, kAny});
  p.num_layers = ring.size(0);
  p.num_heads = ring.size(3);
  p.head_size = ring.size(4);
  p.ring = {ring.mutable_data_ptr(), ring.size(1),   ring.size(2),  ring.stride(0),
            ring.stride(1),          ring.stride(2), ring.stride(3)};

  // Whether it goes with the queries' dtype depends on the device.
  p.cache_dtype = checks.cache_dtype("key_cache", key_cache);
  p.key_cache = checks.cache("key_cache", key_cache, key_cache.scalar_type(),
                             {p.num_layers, kAny, kAny, kAny, p.head_size});
  p.num_kv_heads = key_cache.size(2);
  checks.head_groups(p.num_heads, p.num_kv_heads);

  p.num_rows = block_table.dim() > 0 ? block_table.size(0) : 0;
  p.block_table = checks.block_table("block_table", block_table, p.num_rows);
  p.ring_rows = checks.row_values("ring_rows", ring_rows, p.num_rows);
  p.num_queries = checks.row_values("num_queries", num_queries, p.num_rows);
  p.end_positions = checks.row_values("end_positions", end_positions, p.num_rows);
  p.live_lens = checks.row_values("live_lens", live_lens, p.num_rows);
  p.num_entries = checks.row_values("num_entries", num_entries, p.num_rows);
  p.scale = checks.scale(scale);
  if (key_scales.has_value()) {
    checks.tensor("key_scales", *key_scales, ScalarType::Float, {p.num_layers});
    p.key_scales = static_cast<const float*>(key_scales->const_data_ptr());
  }
  p.scores = checks.head_rows<float>("scores", scores, ScalarType::Float, p.num_layers, p.num_rows,
                                     p.num_kv_heads);
  if (peaks.has_value()) {
    p.peaks = checks.head_rows<float>("peaks", *peaks, ScalarType::Float, p.num_layers, p.num_rows,
                                      p.num_kv_heads);
    checks.same_length("peaks", *peaks, "scores", scores);
  }
  on_device(
      checks, [&] { cpu::score_window(p); },
      [&](const cuda::Stream& stream) { cuda::score_window(p, stream); });
}

}  // namespace ems
