// SPDX-License-Identifier: Apache-2.0

#include <algorithm>

#include "cuda/item_batches.h"
#include "cuda/kernel_dispatch.h"
#include "ems/key_moments.cuh"
#include "ems/launch.cuh"
#include "launchers.h"

namespace ems::cuda {
namespace {

// Keys per CTA: few enough that one long request keeps a GPU busy, many enough that its part of the
// scratch memory does not count. It depends on no other row, and so does no rounding.
constexpr int64_t kKeysPerPart = 8192;
// Of a row beyond that many parts, each has more keys, so that the scratch memory of an item stays
// within what there is.
constexpr int64_t kMaxParts = 64;

}  // namespace

void key_moments(const KeyMomentsParams& p, const Stream& stream) {
  constexpr const char* kOp = "key_moments";
  dispatch(kOp, p.dtype, p.head_size, [&](auto element, auto head_size) {
    using C = decltype(element);
    constexpr int kHeadSize = decltype(head_size)::value;
    using Shape = MomentsShape<kHeadSize>;
    using Part = MomentsPart<kHeadSize>;
    static_assert(kMaxParts * sizeof(Part) <= kMaxScratchBytes);
    const int64_t max_keys = p.block_table.num_columns * p.key_cache.block_size;
    const int64_t keys_per_part = std::max(kKeysPerPart, (max_keys + kMaxParts - 1) / kMaxParts);
    const int64_t num_parts = std::max<int64_t>((max_keys + keys_per_part - 1) / keys_per_part, 1);
    const bool with_products = p.products.data != nullptr;
    const int64_t num_blocks = with_products ? Shape::kBlocks : 1;
    const int64_t row_tiles = with_products ? kHeadSize / kMomentsRows : 1;
    const auto run_batch = [&](int64_t first, int64_t count, void* scratch) {
      auto* parts = static_cast<Part*>(scratch);
      launch(kOp, key_moments_kernel<C, kHeadSize>, {num_parts, count, num_blocks}, Shape::kThreads,
             sizeof(MomentsShared<kHeadSize>), stream.handle, p, first, keys_per_part, num_parts,
             parts);
      launch(kOp, key_moments_sum_kernel<C, kHeadSize>, {row_tiles, count}, kMomentsThreads,
             sizeof(MomentsSumShared<kHeadSize>), stream.handle, p, first, keys_per_part, num_parts,
             parts);
    };
    for_item_batches(num_items(p), num_parts * int64_t{sizeof(Part)}, 1, stream, run_batch);
  });
}

}  // namespace ems::cuda
