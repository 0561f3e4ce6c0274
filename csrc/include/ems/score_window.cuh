// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "ems/attention_sums.cuh"
#include "ems/combine_lse.cuh"
#include "ems/items.h"
#include "ems/params.h"

// score_window: the recorded last queries of every request that is compacted, for all layers.
namespace ems {

// Most queries an item may have; its log-sum-exps are this far apart.
EMS_HOST_DEVICE inline int64_t max_window_queries(const ScoreWindowParams& p) {
  return p.ring.window * (p.num_heads / p.num_kv_heads);
}

// The recorded queries of one kv_head, newest first; query heads of the group within a query.
class WindowQueries {
 public:
  EMS_DEVICE WindowQueries(const ScoreWindowParams& p, const Item& item, int64_t index)
      : group_(static_cast<int32_t>(p.num_heads / p.num_kv_heads)),
        window_(static_cast<int32_t>(p.ring.window)),
        newest_place_((p.end_positions[item.row] - 1) % window_),
        live_len_(p.live_lens[item.row]),
        place_stride_(p.ring.place_stride),
        head_stride_(p.ring.head_stride),
        lse_index_(index * max_window_queries(p)) {
    const int32_t num_queries = p.num_queries[item.row];
    size_ = (num_queries < live_len_ ? num_queries : live_len_) * group_;
    base_ = item.layer * p.ring.layer_stride + p.ring_rows[item.row] * p.ring.row_stride +
            item.head * group_ * p.ring.head_stride;
  }

  EMS_DEVICE int32_t size() const { return size_; }

  EMS_DEVICE Query at(int32_t index) const {
    const int32_t age = index / group_;
    const int32_t place =
        newest_place_ - age < 0 ? newest_place_ - age + window_ : newest_place_ - age;
    return {base_ + place * place_stride_ + index % group_ * head_stride_, live_len_ - age,
            lse_index_ + index};
  }

  EMS_DEVICE int32_t first_seeing(int32_t key) const { return 0; }

 private:
  int32_t group_;
  int32_t window_;
  int32_t newest_place_;
  int32_t live_len_;
  int64_t place_stride_;
  int64_t head_stride_;
  int64_t lse_index_;
  int64_t base_;
  int32_t size_;
};

EMS_DEVICE float window_scale(const ScoreWindowParams& p, int64_t layer) {
  return p.key_scales == nullptr ? p.scale : p.scale * p.key_scales[layer];
}

// CTA (x, split, tile): item first_item + x, one part of its keys, one tile of its queries.
// partial: [num_splits, num_items * max_window_queries], float32, of the items of this launch.
template <typename T, int HEAD_SIZE, typename C>
EMS_KERNEL((SumShape<T, HEAD_SIZE>::kThreads), (SumShape<T, HEAD_SIZE>::kMinCtas))
score_window_lse_kernel(ScoreWindowParams p, int64_t first_item, int32_t keys_per_split,
                        int64_t num_items, float* partial) {
  const Item item = item_at(p, first_item + device::cta_x());
  const WindowQueries queries(p, item, device::cta_x());
  const int32_t first_query =
      static_cast<int32_t>(device::cta_z()) * SumShape<T, HEAD_SIZE>::kStaying;
  if (first_query >= queries.size()) return;
  const int32_t live_len = p.live_lens[item.row];
  const int32_t first_key = static_cast<int32_t>(device::cta_y()) * keys_per_split;
  const int32_t end_key =
      first_key + keys_per_split < live_len ? first_key + keys_per_split : live_len;
  const PagedKeys keys{p.key_cache, p.block_table, item.layer, item.row, item.head};
  float* out = partial + device::cta_y() * num_items * max_window_queries(p);
  compute_lse<T, HEAD_SIZE, C>(queries, static_cast<const T*>(p.ring.data), keys, first_query,
                               first_key, end_key, window_scale(p, item.layer),
                               [&](int64_t index, float value) { out[index] = value; });
}

// What beyond its entries lies of keys first_key..first_key+NUM_KEYS-1.
template <int NUM_KEYS, int NUM_THREADS>
EMS_DEVICE void clear_beyond(int32_t num_entries, int32_t first_key, int64_t length,
                             float* values) {
  for (int32_t i = device::thread_index(); i < NUM_KEYS; i += NUM_THREADS) {
    const int64_t entry = first_key + i;
    if (entry >= num_entries && entry < length) values[entry] = 0;
  }
}

// CTA (x, tile): item first_item + x, one tile of its keys. Also clears what lies beyond the
// entries. lse: [num_items * max_window_queries], of the items of this launch.
template <typename T, int HEAD_SIZE, typename C>
EMS_KERNEL((SumShape<T, HEAD_SIZE>::kThreads), (SumShape<T, HEAD_SIZE>::kMinCtas))
score_window_kernel(ScoreWindowParams p, int64_t first_item, const float* lse) {
  constexpr int32_t kStaying = SumShape<T, HEAD_SIZE>::kStaying;
  const Item item = item_at(p, first_item + device::cta_x());
  const WindowQueries queries(p, item, device::cta_x());
  const int32_t first_key = static_cast<int32_t>(device::cta_y()) * kStaying;
  const int32_t num_entries = p.num_entries[item.row];
  float* scores = p.scores.at(item.layer, item.row, item.head);
  float* peaks = p.peaks.data == nullptr ? nullptr : p.peaks.at(item.layer, item.row, item.head);
  constexpr int kThreads = SumShape<T, HEAD_SIZE>::kThreads;
  clear_beyond<kStaying, kThreads>(num_entries, first_key, p.scores.length, scores);
  if (peaks != nullptr) {
    clear_beyond<kStaying, kThreads>(num_entries, first_key, p.peaks.length, peaks);
  }
  if (first_key >= num_entries) return;

  const PagedKeys keys{p.key_cache, p.block_table, item.layer, item.row, item.head};
  const float factor = 1.0f / static_cast<float>(p.num_heads / p.num_kv_heads);
  add_attention<T, HEAD_SIZE, C, ReceivedAndPeak>(
      queries, static_cast<const T*>(p.ring.data), keys, first_key, num_entries,
      window_scale(p, item.layer), lse, [&](int32_t key, const ReceivedAndPeak& received) {
        scores[key] = received.sum * factor;
        if (peaks != nullptr) peaks[key] = received.peak;
      });
}

}  // namespace ems
