// SPDX-License-Identifier: Apache-2.0

#include "cuda/kernel_dispatch.h"
#include "ems/launch.cuh"
#include "ems/score_queries.cuh"
#include "launchers.h"

namespace ems::cuda {

void score_queries(const ScoreQueriesParams& params, const Queue& queue) {
  ScoreQueriesParams p = params;
  constexpr const char* kOp = "score_queries";
  dispatch(kOp, p.dtype, p.head_size, [&](auto element, auto head_size) {
    using T = decltype(element);
    constexpr int kHeadSize = decltype(head_size)::value;
    using Shape = MassShape<T, kHeadSize>;
    using Shared = MassShared<T, kHeadSize, Shape::kLeft, Shape::kRight>;
    check_alignment<T>(kOp, "query", p.query.data, p.query.token_stride, p.query.head_stride);
    check_alignment<T>(kOp, "key_cache", p.key_cache);

    const float* lse = p.lse;
    if (lse == nullptr) {
      auto* computed =
          static_cast<float*>(queue.allocate(p.num_tokens * p.num_heads * int64_t{sizeof(float)}));
      p.lse_token_stride = p.num_heads;
      p.lse_head_stride = 1;
      launch(kOp, score_queries_lse_kernel<T, kHeadSize>,
             {max_query_tiles<Shape>(p), p.num_kv_heads}, Shape::kThreads, sizeof(Shared),
             queue.stream, p, computed);
      lse = computed;
    }
    const int64_t max_keys = p.block_table.num_columns * p.key_cache.block_size;
    const int64_t key_tiles = (max_keys + Shape::kLeft - 1) / Shape::kLeft;
    launch(kOp, score_queries_kernel<T, kHeadSize>, {key_tiles * p.num_kv_heads, p.num_rows},
           Shape::kThreads, sizeof(Shared), queue.stream, p, lse);
  });
}

}  // namespace ems::cuda
