// SPDX-License-Identifier: Apache-2.0

#include "cuda/item_batches.h"
#include "cuda/kernel_dispatch.h"
#include "ems/key_scores.cuh"
#include "ems/launch.cuh"
#include "launchers.h"

namespace ems::cuda {

void key_scores(const KeyScoresParams& p, const Stream& stream) {
  constexpr const char* kOp = "key_scores";
  dispatch(kOp, p.dtype, p.head_size, [&](auto element, auto head_size) {
    using C = decltype(element);
    constexpr int kHeadSize = decltype(head_size)::value;
    using Shape = KeyScoresShape<kHeadSize>;
    const int64_t tiles = (p.distinctness.length + Shape::kKeys - 1) / Shape::kKeys;
    for_item_batches(num_items(p), 0, 1, stream, [&](int64_t first, int64_t count, void*) {
      launch(kOp, key_scores_kernel<C, kHeadSize>, {tiles, count}, Shape::kThreads,
             sizeof(KeyScoresShared<kHeadSize>), stream.handle, p, first);
    });
  });
}

}  // namespace ems::cuda
