// SPDX-License-Identifier: Apache-2.0

#include <stdexcept>
#include <string>

#include "cuda/item_batches.h"
#include "cuda/kernel_dispatch.h"
#include "ems/launch.cuh"
#include "ems/merge_compact.cuh"
#include "launchers.h"

namespace ems::cuda {
namespace {

// Sizes of the parts of an item's scratch memory; each part starts at a multiple of 16 bytes.
// merge_scratch_bytes of ems_vllm/engine/worker/memory.py bounds what a group of items takes.
struct ItemScratch {
  int64_t entries, scores, members, starts, sort;

  int64_t total() const { return entries + scores + members + starts + sort; }
};

int64_t padded(int64_t num_bytes) { return (num_bytes + 15) / 16 * 16; }

template <typename T>
ItemScratch item_scratch(const MergeCompactParams& p, int32_t sort_len) {
  const int64_t max_budget = p.kept_idx.length;
  const bool sorts_in_scratch = sort_len > kMaxSharedMembers;
  return {padded(max_budget * 2 * p.head_size * static_cast<int64_t>(sizeof(T))),
          p.paged_scores.data == nullptr ? 0 : padded(max_budget * 4),
          padded(p.merge_idx.length * 4), padded((max_budget + 1) * 4),
          sorts_in_scratch ? sort_len * 8 : 0};
}

// Items that are read before any of them is written. The rows of a group are consecutive, and so
// are their items, with all kv_heads in between.
int64_t items_together(const char* op, const MergeCompactParams& p) {
  if (p.rows_together == 1) return 1;
  const int64_t count = p.rows_together * p.num_kv_heads;
  if (count <= kMaxBatch) return count;
  throw std::runtime_error(std::string("ems_vllm::") + op +
                           ": rows_together * num_kv_heads must be at most " +
                           std::to_string(kMaxBatch) + " on a GPU, got " + std::to_string(count));
}

}  // namespace

void merge_compact(const MergeCompactParams& p, const Stream& stream) {
  constexpr const char* kOp = "merge_compact";
  dispatch(kOp, p.dtype, p.head_size, [&](auto element, auto head_size) {
    using T = decltype(element);
    constexpr int kHeadSize = decltype(head_size)::value;
    check_alignment<T>(kOp, "key_cache", p.key_cache);
    check_alignment<T>(kOp, "value_cache", p.value_cache);

    const int64_t max_budget = p.kept_idx.length;
    const int32_t sort_len = sort_length(p.merge_idx.length);
    const ItemScratch sizes = item_scratch<T>(p, sort_len);
    const bool merges = p.merge_idx.length > 0;
    const auto run_batch = [&](int64_t first, int64_t count, void* scratch) {
      auto* next = static_cast<unsigned char*>(scratch);
      const auto take = [&](int64_t per_item) {
        void* part = per_item == 0 ? nullptr : next;
        next += count * per_item;
        return part;
      };
      const Staging<T> staging{static_cast<T*>(take(sizes.entries)),
                               static_cast<float*>(take(sizes.scores))};
      ClassLists lists{static_cast<int32_t*>(take(sizes.members)),
                       static_cast<int32_t*>(take(sizes.starts))};
      auto* sort_scratch = static_cast<uint64_t*>(take(sizes.sort));
      if (merges) {
        const int64_t shared_bytes = sizes.sort > 0 ? 0 : sort_len * int64_t{sizeof(uint64_t)};
        launch(kOp, group_members_kernel, {count}, kGroupThreads, shared_bytes, stream.handle, p,
               first, lists, sort_len, sort_scratch);
      } else {
        lists = {nullptr, nullptr};
      }
      constexpr int64_t kClassesPerCta = kMergeThreads / device::kWarpSize;
      launch(kOp, merge_classes_kernel<T, kHeadSize>,
             {(max_budget + kClassesPerCta - 1) / kClassesPerCta, count}, kMergeThreads, 0,
             stream.handle, p, first, lists, staging);
      const int64_t num_vectors = max_budget * EntryLayout<T, kHeadSize>::kVectors;
      launch(kOp, write_targets_kernel<T, kHeadSize>,
             {(num_vectors + kMergeThreads - 1) / kMergeThreads, count}, kMergeThreads, 0,
             stream.handle, p, first, staging);
    };
    for_item_batches(num_items(p), sizes.total(), items_together(kOp, p), stream, run_batch);
  });
}

}  // namespace ems::cuda
