// SPDX-License-Identifier: Apache-2.0

#include "cuda/item_batches.h"
#include "cuda/kernel_dispatch.h"
#include "ems/assign_classes.cuh"
#include "ems/launch.cuh"
#include "launchers.h"

namespace ems::cuda {

void assign_classes(const AssignClassesParams& p, const Stream& stream) {
  constexpr const char* kOp = "assign_classes";
  dispatch(kOp, p.dtype, p.head_size, [&](auto cached, auto head_size) {
    using C = decltype(cached);
    using T = ComputeType<C>;
    constexpr int kHeadSize = decltype(head_size)::value;
    using Shape = AssignShape<T, kHeadSize>;
    check_alignment<C>(kOp, "key_cache", p.key_cache);
    check_alignment<C>(kOp, "value_cache", p.value_cache);

    constexpr int64_t kWarpsPerCta = kNormThreads / device::kWarpSize;
    const int64_t max_budget = p.kept_idx.length;
    const int64_t member_tiles = (p.merge_idx.length + Shape::kMembers - 1) / Shape::kMembers;
    const int64_t scratch_per_item = 2 * std::max<int64_t>(max_budget, 1) * int64_t{sizeof(float)};
    for_item_batches(num_items(p), scratch_per_item, 1, stream,
                     [&](int64_t first, int64_t count, void* scratch) {
                       auto* inverses = static_cast<float*>(scratch);
                       launch(kOp, centre_norms_kernel<C, kHeadSize>,
                              {(max_budget + kWarpsPerCta - 1) / kWarpsPerCta, count}, kNormThreads,
                              0, stream.handle, p, first, inverses);
                       launch(kOp, assign_classes_kernel<T, kHeadSize, C>, {member_tiles, count},
                              Shape::kThreads, sizeof(AssignShared<T, kHeadSize>), stream.handle, p,
                              first, inverses);
                     });
  });
}

}  // namespace ems::cuda
