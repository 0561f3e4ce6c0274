// SPDX-License-Identifier: Apache-2.0

#include "cuda/kernel_dispatch.h"
#include "ems/launch.cuh"
#include "ems/score_queries.cuh"
#include "launchers.h"

namespace ems::cuda {
namespace {

constexpr const char* kOp = "score_queries";

// A kernel and how it is launched. LSE is float for the one that writes log-sum-exps, const float
// for the one that reads them.
template <typename LSE>
struct Pass {
  void (*kernel)(ScoreQueriesParams, LSE*);
  int64_t tile_size;  // queries per CTA of the first pass, keys per CTA of the second
  int num_threads;
  int64_t shared_bytes;
};

template <typename T, int HEAD_SIZE, typename LSE>
Pass<LSE> pass_of(void (*kernel)(ScoreQueriesParams, LSE*)) {
  using Shape = SumShape<T, HEAD_SIZE>;
  return {kernel, Shape::kStaying, Shape::kThreads,
          sizeof(SumShared<T, HEAD_SIZE, Shape::kStaying, Shape::kStreaming>)};
}

template <typename T, int HEAD_SIZE, typename LSE>
Pass<LSE> sm90_pass_of(void (*kernel)(ScoreQueriesParams, LSE*)) {
  using Shape = sm90::SumShape<HEAD_SIZE>;
  return {kernel, Shape::kStaying, Shape::kThreads, sizeof(sm90::SumShared<T, HEAD_SIZE>)};
}

// Keys stream past in the first pass, where float8 would have to be converted on the way; products
// of groups read them as they were copied.
template <typename T, int HEAD_SIZE, typename C>
Pass<float> choose_lse_pass() {
#if EMS_HAS_SM90A
  if constexpr (sizeof(T) == 2 && sizeof(C) == 2) {
    if (compute_capability() == 90) {
      return sm90_pass_of<T, HEAD_SIZE>(score_queries_lse_sm90_kernel<T, HEAD_SIZE>);
    }
  }
#endif
  return pass_of<T, HEAD_SIZE>(score_queries_lse_kernel<T, HEAD_SIZE, C>);
}

// float32 has no tensor-core product that is exact enough.
template <typename T, int HEAD_SIZE, typename C>
Pass<const float> choose_pass() {
#if EMS_HAS_SM90A
  if constexpr (sizeof(T) == 2) {
    if (compute_capability() == 90) {
      return sm90_pass_of<T, HEAD_SIZE>(score_queries_sm90_kernel<T, HEAD_SIZE, C>);
    }
  }
#endif
  return pass_of<T, HEAD_SIZE>(score_queries_kernel<T, HEAD_SIZE, C>);
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

        const float* lse = p.lse;
        if (lse == nullptr) {
          auto* computed = static_cast<float*>(
              stream.allocate(p.num_tokens * p.num_heads * int64_t{sizeof(float)}));
          p.lse_token_stride = p.num_heads;
          p.lse_head_stride = 1;
          const Pass<float> pass = choose_lse_pass<T, kHeadSize, C>();
          launch(kOp, pass.kernel, {max_query_tiles(p, pass.tile_size), p.num_kv_heads},
                 pass.num_threads, pass.shared_bytes, stream.handle, p, computed);
          lse = computed;
        }
        const int64_t max_keys = p.block_table.num_columns * p.key_cache.block_size;
        const Pass<const float> pass = choose_pass<T, kHeadSize, C>();
        const int64_t key_tiles = (max_keys + pass.tile_size - 1) / pass.tile_size;
        launch(kOp, pass.kernel, {key_tiles * p.num_kv_heads, p.num_rows}, pass.num_threads,
               pass.shared_bytes, stream.handle, p, lse);
      });
}

}  // namespace ems::cuda
