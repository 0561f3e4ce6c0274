// SPDX-License-Identifier: Apache-2.0

#include <host/on_device.h>

#include "checks.h"
#include "ems/sampling.h"
#include "ops.h"

namespace ems {

void score_queries(const Tensor& query, const Tensor& key_cache, const Tensor& block_table,
                   const Tensor& query_starts, const Tensor& query_lens, const Tensor& seq_lens,
                   const Tensor& accumulate_lens, const Tensor& score_table,
                   const std::optional<Tensor>& lse, double scale, int64_t sample_stride,
                   const Tensor& scores) {
  const ArgumentChecks checks("score_queries", query);
  ScoreQueriesParams p{};
  p.dtype = checks.float_dtype("query", query);
  const ScalarType dtype = query.scalar_type();
  checks.tensor("query", query, dtype, {kAny, kAny, kAny});
  p.num_tokens = query.size(0);
  p.num_heads = query.size(1);
  p.head_size = query.size(2);
  p.query = {query.mutable_data_ptr(), query.stride(0), query.stride(1)};

  // Whether it goes with the queries' dtype depends on the device.
  p.cache_dtype = checks.cache_dtype("key_cache", key_cache);
  p.key_cache = checks.cache("key_cache", key_cache, key_cache.scalar_type(),
                             {kAny, kAny, kAny, p.head_size});
  p.num_kv_heads = key_cache.size(1);
  checks.head_groups(p.num_heads, p.num_kv_heads);

  p.num_rows = block_table.dim() > 0 ? block_table.size(0) : 0;
  p.block_table = checks.block_table("block_table", block_table, p.num_rows);
  p.query_starts = checks.row_values("query_starts", query_starts, p.num_rows);
  p.query_lens = checks.row_values("query_lens", query_lens, p.num_rows);
  p.seq_lens = checks.row_values("seq_lens", seq_lens, p.num_rows);
  p.accumulate_lens = checks.row_values("accumulate_lens", accumulate_lens, p.num_rows);
  p.score_table = checks.block_table("score_table", score_table, p.num_rows);
  if (lse.has_value()) {
    checks.strided("lse", *lse, ScalarType::Float, {p.num_tokens, p.num_heads});
    p.lse = static_cast<const float*>(lse->const_data_ptr());
    p.lse_token_stride = lse->stride(0);
    p.lse_head_stride = lse->stride(1);
  }
  checks.require(1 <= sample_stride && sample_stride <= kMaxSampleStride,
                 "sample_stride must be in 1..", kMaxSampleStride, ", got ", sample_stride);
  p.sample_stride = sample_stride;
  p.scale = checks.scale(scale);
  p.scores = checks.scores("scores", scores, {kAny, p.num_kv_heads, p.key_cache.block_size});
  on_device(
      checks, [&] { cpu::score_queries(p); },
      [&](const cuda::Stream& stream) { cuda::score_queries(p, stream); });
}

}  // namespace ems
