// SPDX-License-Identifier: Apache-2.0

#include "cuda/item_batches.h"
#include "ems/launch.cuh"
#include "ems/select_entries.cuh"
#include "launchers.h"

namespace ems::cuda {

void select_entries(const SelectEntriesParams& p, const Stream& stream) {
  const int32_t sort_len = sort_length(p.merge_idx.length);
  const bool in_shared = sort_len <= kMaxSharedCandidates;
  const int64_t scratch_per_item = in_shared ? 0 : sort_len * int64_t{sizeof(uint64_t)};
  for_item_batches(num_items(p), scratch_per_item, 1, stream,
                   [&](int64_t first, int64_t count, void* scratch) {
                     launch("select_entries", select_entries_kernel, {count}, kSelectThreads,
                            select_shared_bytes(sort_len), stream.handle, p, first, sort_len,
                            static_cast<uint64_t*>(scratch));
                   });
}

}  // namespace ems::cuda
