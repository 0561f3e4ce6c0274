// SPDX-License-Identifier: Apache-2.0

#include "cuda/kernel_dispatch.h"
#include "ems/launch.cuh"
#include "ems/score_queries.cuh"
#include "launchers.h"

namespace ems::cuda {
namespace {

constexpr const char* kOp = "score_queries";

// One generation of the two kernels and how they are launched.
struct Kernels {
  void (*compute_lse)(ScoreQueriesParams, float*);
  void (*add_scores)(ScoreQueriesParams, const float*);
  int64_t tile_size;  // queries per CTA of the first, keys per CTA of the second
  int num_threads;
  int64_t shared_bytes;
};

template <typename T, int HEAD_SIZE, typename C>
Kernels choose_kernels() {
#if EMS_HAS_SM90A
  // float32 has no tensor-core product that is exact enough; float8 keys are converted on the way.
  if constexpr (sizeof(T) == 2 && sizeof(C) == 2) {
    if (compute_capability() == 90) {
      using Shape = sm90::SumShape<HEAD_SIZE>;
      return {score_queries_lse_sm90_kernel<T, HEAD_SIZE>, score_queries_sm90_kernel<T, HEAD_SIZE>,
              Shape::kStaying, Shape::kThreads, sizeof(sm90::SumShared<T, HEAD_SIZE>)};
    }
  }
#endif
  using Shape = SumShape<T, HEAD_SIZE>;
  return {score_queries_lse_kernel<T, HEAD_SIZE, C>, score_queries_kernel<T, HEAD_SIZE, C>,
          Shape::kStaying, Shape::kThreads,
          sizeof(SumShared<T, HEAD_SIZE, Shape::kStaying, Shape::kStreaming>)};
}

}  // namespace

void score_queries(const ScoreQueriesParams& params, const Stream& stream) {
  ScoreQueriesParams p = params;
  dispatch(
      kOp, p.dtype, p.cache_dtype, p.head_size, [&](auto element, auto cached, auto head_size) {
        using T = decltype(element);
        using C = decltype(cached);
        constexpr int kHeadSize = decltype(head_size)::value;
        check_alignment<T>(kOp, "query", p.query.data, p.query.token_stride, p.query.head_stride);
        check_alignment<C>(kOp, "key_cache", p.key_cache);

        const Kernels kernels = choose_kernels<T, kHeadSize, C>();
        const float* lse = p.lse;
        if (lse == nullptr) {
          auto* computed = static_cast<float*>(
              stream.allocate(p.num_tokens * p.num_heads * int64_t{sizeof(float)}));
          p.lse_token_stride = p.num_heads;
          p.lse_head_stride = 1;
          launch(kOp, kernels.compute_lse, {max_query_tiles(p, kernels.tile_size), p.num_kv_heads},
                 kernels.num_threads, kernels.shared_bytes, stream.handle, p, computed);
          lse = computed;
        }
        const int64_t max_keys = p.block_table.num_columns * p.key_cache.block_size;
        const int64_t key_tiles = (max_keys + kernels.tile_size - 1) / kernels.tile_size;
        launch(kOp, kernels.add_scores, {key_tiles * p.num_kv_heads, p.num_rows},
               kernels.num_threads, kernels.shared_bytes, stream.handle, p, lse);
      });
}

}  // namespace ems::cuda
