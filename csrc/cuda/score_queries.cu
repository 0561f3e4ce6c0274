// SPDX-License-Identifier: Apache-2.0

#include <algorithm>

#include "cuda/kernel_dispatch.h"
#include "ems/combine_lse.cuh"
#include "ems/launch.cuh"
#include "ems/score_queries.cuh"
#include "launchers.h"

namespace ems::cuda {
namespace {

constexpr const char* kOp = "score_queries";

// A kernel and how it is launched.
template <typename... ARGS>
struct Pass {
  void (*kernel)(ScoreQueriesParams, ARGS...);
  int64_t tile_size;  // queries per CTA of the first pass, keys per CTA of the second
  int num_threads;
  int64_t shared_bytes;
};

using LsePass = Pass<int32_t, float*>;
using SumPass = Pass<const float*>;

template <typename T, int HEAD_SIZE, typename... ARGS>
Pass<ARGS...> pass_of(void (*kernel)(ScoreQueriesParams, ARGS...)) {
  using Shape = SumShape<T, HEAD_SIZE>;
  return {kernel, Shape::kStaying, Shape::kThreads,
          sizeof(SumShared<T, HEAD_SIZE, Shape::kStaying, Shape::kStreaming>)};
}

template <typename T, int HEAD_SIZE, typename... ARGS>
Pass<ARGS...> sm90_pass_of(void (*kernel)(ScoreQueriesParams, ARGS...)) {
  using Shape = sm90::SumShape<HEAD_SIZE>;
  return {kernel, Shape::kStaying, Shape::kThreads, sizeof(sm90::SumShared<T, HEAD_SIZE>)};
}

// Keys stream past in the first pass, where float8 would have to be converted on the way; products
// of groups read them as they were copied.
template <typename T, int HEAD_SIZE, typename C>
LsePass choose_lse_pass() {
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
SumPass choose_pass() {
#if EMS_HAS_SM90A
  if constexpr (sizeof(T) == 2) {
    if (compute_capability() == 90) {
      return sm90_pass_of<T, HEAD_SIZE>(score_queries_sm90_kernel<T, HEAD_SIZE, C>);
    }
  }
#endif
  return pass_of<T, HEAD_SIZE>(score_queries_kernel<T, HEAD_SIZE, C>);
}

// Parts that the keys of a row are cut into for the first pass, which would otherwise have one CTA
// for each tile of queries: as many as give every multiprocessor two, of enough keys each that
// loading the queries does not count.
int64_t num_key_parts(int64_t num_ctas, int64_t max_keys) {
  constexpr int64_t kLeastKeys = 1024;
  const int64_t wanted = 2 * multiprocessor_count() / std::max<int64_t>(num_ctas, 1);
  return std::max<int64_t>(std::min(wanted, max_keys / kLeastKeys), 1);
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

        const int64_t max_keys = p.block_table.num_columns * p.key_cache.block_size;
        const float* lse = p.lse;
        if (lse == nullptr) {
          const LsePass pass = choose_lse_pass<T, kHeadSize, C>();
          const int64_t query_tiles = max_query_tiles(p, pass.tile_size);
          const int64_t num_parts = num_key_parts(query_tiles * p.num_kv_heads, max_keys);
          const int64_t num_queries = p.num_tokens * p.num_heads;
          auto* computed = static_cast<float*>(
              stream.allocate(num_parts * num_queries * int64_t{sizeof(float)}));
          p.lse_token_stride = p.num_heads;
          p.lse_head_stride = 1;
          launch(kOp, pass.kernel, {query_tiles, p.num_kv_heads, num_parts}, pass.num_threads,
                 pass.shared_bytes, stream.handle, p, static_cast<int32_t>(num_parts), computed);
          if (num_parts > 1) {
            launch(kOp, combine_lse_kernel, {(num_queries + kCombineThreads - 1) / kCombineThreads},
                   kCombineThreads, 0, stream.handle, num_queries, static_cast<int32_t>(num_parts),
                   computed);
          }
          lse = computed;
        }
        const SumPass pass = choose_pass<T, kHeadSize, C>();
        const int64_t key_tiles = (max_keys + pass.tile_size - 1) / pass.tile_size;
        launch(kOp, pass.kernel, {key_tiles * p.num_kv_heads, p.num_rows}, pass.num_threads,
               pass.shared_bytes, stream.handle, p, lse);
      });
}

}  // namespace ems::cuda
