// SPDX-License-Identifier: Apache-2.0

#include "cuda/item_batches.h"
#include "cuda/kernel_dispatch.h"
#include "ems/launch.cuh"
#include "ems/vector_norms.cuh"
#include "launchers.h"

namespace ems::cuda {

void vector_norms(const VectorNormsParams& p, const Stream& stream) {
  constexpr const char* kOp = "vector_norms";
  dispatch(kOp, p.dtype, p.head_size, [&](auto element, auto head_size) {
    using C = decltype(element);
    constexpr int kHeadSize = decltype(head_size)::value;
    const int64_t tiles = (p.norms.length + kVectorNormThreads - 1) / kVectorNormThreads;
    for_item_batches(num_items(p), 0, 1, stream, [&](int64_t first, int64_t count, void*) {
      launch(kOp, vector_norms_kernel<C, kHeadSize>, {tiles, count}, kVectorNormThreads,
             sizeof(VectorNormsShared), stream.handle, p, first);
    });
  });
}

}  // namespace ems::cuda
