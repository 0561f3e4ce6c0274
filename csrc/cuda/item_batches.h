// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstdint>

#include "launchers.h"

namespace ems::cuda {

// A grid has no more CTAs in y, where kernels have one per item of a batch.
constexpr int64_t kMaxBatch = 65535;

// Calls f(first, count, scratch) until all items are done, with scratch for `count` items: as many
// as kMaxScratchBytes hold and a grid takes, in whole groups of `group` consecutive items, at least
// one group. So the scratch exceeds kMaxScratchBytes where that of one group does. The batches run
// one after the other and share the memory. `group` divides num_items and is at most kMaxBatch.
template <typename F>
void for_item_batches(int64_t num_items, int64_t scratch_per_item, int64_t group,
                      const Stream& stream, const F& f) {
  if (num_items == 0) return;
  const int64_t most = scratch_per_item == 0 ? num_items : kMaxScratchBytes / scratch_per_item;
  const int64_t num_groups = std::min({most, kMaxBatch, num_items}) / group;
  const int64_t batch = std::max<int64_t>(num_groups, 1) * group;
  void* scratch = scratch_per_item == 0 ? nullptr : stream.allocate(batch * scratch_per_item);
  for (int64_t first = 0; first < num_items; first += batch) {
    f(first, std::min(batch, num_items - first), scratch);
  }
}

}  // namespace ems::cuda
