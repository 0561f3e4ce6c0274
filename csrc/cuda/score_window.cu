// SPDX-License-Identifier: Apache-2.0

#include <algorithm>

#include "cuda/item_batches.h"
#include "cuda/kernel_dispatch.h"
#include "ems/launch.cuh"
#include "ems/score_window.cuh"
#include "launchers.h"

namespace ems::cuda {
namespace {

// Keys per CTA of the first pass: few enough that one long request keeps a GPU busy, many enough
// that loading the queries does not count.
constexpr int32_t kKeysPerSplit = 2048;

}  // namespace

void score_window(const ScoreWindowParams& p, const Stream& stream) {
  constexpr const char* kOp = "score_window";
  dispatch(
      kOp, p.dtype, p.cache_dtype, p.head_size, [&](auto element, auto cached, auto head_size) {
        using T = decltype(element);
        using C = decltype(cached);
        constexpr int kHeadSize = decltype(head_size)::value;
        using Shape = SumShape<T, kHeadSize>;
        using Shared = SumShared<T, kHeadSize, Shape::kStaying, Shape::kStreaming>;
        check_alignment<T>(kOp, "ring", p.ring.data, p.ring.layer_stride, p.ring.row_stride,
                           p.ring.place_stride, p.ring.head_stride);
        check_alignment<C>(kOp, "key_cache", p.key_cache);

        const int64_t max_keys = p.block_table.num_columns * p.key_cache.block_size;
        const int64_t num_splits =
            std::max<int64_t>((max_keys + kKeysPerSplit - 1) / kKeysPerSplit, 1);
        const int64_t query_tiles = (max_window_queries(p) + Shape::kStaying - 1) / Shape::kStaying;
        const int64_t key_tiles = (p.scores.length + Shape::kStaying - 1) / Shape::kStaying;
        const int64_t scratch_per_item =
            num_splits * max_window_queries(p) * int64_t{sizeof(float)};
        for_item_batches(num_items(p), scratch_per_item, 1, stream,
                         [&](int64_t first, int64_t count, void* scratch) {
                           const int64_t num_queries = count * max_window_queries(p);
                           auto* lse = static_cast<float*>(scratch);
                           launch(kOp, score_window_lse_kernel<T, kHeadSize, C>,
                                  {count, num_splits, query_tiles}, Shape::kThreads, sizeof(Shared),
                                  stream.handle, p, first, kKeysPerSplit, count, lse);
                           if (num_splits > 1) {
                             launch(kOp, combine_lse_kernel,
                                    {(num_queries + kCombineThreads - 1) / kCombineThreads},
                                    kCombineThreads, 0, stream.handle, num_queries,
                                    static_cast<int32_t>(num_splits), lse);
                           }
                           launch(kOp, score_window_kernel<T, kHeadSize, C>, {count, key_tiles},
                                  Shape::kThreads, sizeof(Shared), stream.handle, p, first, lse);
                         });
      });
}

}  // namespace ems::cuda
