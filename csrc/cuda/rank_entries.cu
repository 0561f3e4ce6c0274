// SPDX-License-Identifier: Apache-2.0

#include "cuda/item_batches.h"
#include "ems/launch.cuh"
#include "ems/rank_entries.cuh"
#include "launchers.h"

namespace ems::cuda {

void rank_entries(const RankEntriesParams& p, const Stream& stream) {
  const int64_t scratch_per_item = 2 * p.scores.length * static_cast<int64_t>(sizeof(uint64_t));
  for_item_batches(
      num_items(p), scratch_per_item, 1, stream, [&](int64_t first, int64_t count, void* scratch) {
        launch("rank_entries", rank_entries_kernel, {count}, kRankThreads, sizeof(RankShared),
               stream.handle, p, first, static_cast<uint64_t*>(scratch));
      });
}

}  // namespace ems::cuda
