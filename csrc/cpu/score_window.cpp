// SPDX-License-Identifier: Apache-2.0

// One item per layer, row and kv_head: the few queries of the window against all live keys, twice
// over the keys (softmax denominators, then column sums).

#include <vector>

#include "cpu/attention_sums.h"
#include "cpu/index_checks.h"
#include "cpu/parallel.h"
#include "dispatch.h"
#include "launchers.h"

namespace ems::cpu {
namespace {

void check_indices(const ScoreWindowParams& p) {
  const IndexChecks checks("score_window");
  for (int64_t row = 0; row < p.num_rows; ++row) {
    const int64_t max_keys = p.block_table.num_columns * p.key_cache.block_size;
    checks.in_range("ring_rows", row, p.ring_rows[row], 0, p.ring.num_ring_rows - 1);
    checks.in_range("num_queries", row, p.num_queries[row], 0,
                    std::min<int64_t>(p.ring.window, p.end_positions[row]));
    checks.in_range("live_lens", row, p.live_lens[row], 0, max_keys);
    checks.in_range("num_entries", row, p.num_entries[row], 0,
                    std::min<int64_t>(p.live_lens[row], p.scores.length));
    checks.entries("block_table", p.block_table, row, p.live_lens[row], p.key_cache);
  }
}

// Queries of type T, keys of type C.
template <typename T, typename C>
void score_head(const ScoreWindowParams& p, const Item& item) {
  const int64_t layer = item.layer, row = item.row, head = item.head;
  const int64_t group = p.num_heads / p.num_kv_heads;
  const int64_t num_entries = p.num_entries[row];
  float* scores = p.scores.at(layer, row, head);
  float* peaks = p.peaks.data == nullptr ? nullptr : p.peaks.at(layer, row, head);
  std::fill(scores, scores + p.scores.length, 0.0f);
  if (peaks != nullptr) std::fill(peaks, peaks + p.peaks.length, 0.0f);

  const int64_t num_queries = std::min(p.num_queries[row], p.live_lens[row]);
  const int64_t num_rows = num_queries * group;
  if (num_rows == 0 || num_entries == 0) return;

  const float scale = p.key_scales == nullptr ? p.scale : p.scale * p.key_scales[layer];
  const Factors<T, C> factors(p.head_size);
  Floats rows(num_rows * factors.num_words());
  std::vector<int64_t> visible(num_rows);
  for (int64_t i = 0; i < num_rows; ++i) {
    const int64_t age = i / group;
    const int64_t place = (p.end_positions[row] - 1 - age) % p.ring.window;
    const T* query = p.ring.at<const T>(layer, p.ring_rows[row], place, head * group + i % group);
    factors.load(query, rows.data() + i * factors.num_words());
    visible[i] = p.live_lens[row] - age;
  }

  KeyTiles keys(factors);
  const auto pack = [&](int64_t first, int64_t end) {
    keys.pack(first, std::min(KeyTiles::kMaxKeys, end - first), [&](int64_t key, float* scratch) {
      const C* vector = p.key_cache.entry<const C>(p.block_table, row, layer, head, key);
      return factors.view(vector, scratch);
    });
  };

  std::vector<SoftmaxState> states(num_rows);
  simd().init_softmax(states.data(), num_rows);
  for (int64_t first = 0; first < p.live_lens[row]; first += KeyTiles::kMaxKeys) {
    pack(first, p.live_lens[row]);
    keys.update_softmax(rows.data(), scale, visible.data(), num_rows, states.data());
  }
  Floats lse(num_rows);
  simd().finish_softmax(states.data(), num_rows, lse.data());

  Floats received(KeyTiles::kMaxKeys);
  Floats most(peaks == nullptr ? 0 : KeyTiles::kMaxKeys);
  for (int64_t first = 0; first < num_entries; first += KeyTiles::kMaxKeys) {
    pack(first, num_entries);
    std::fill(received.begin(), received.end(), 0.0f);
    std::fill(most.begin(), most.end(), 0.0f);
    keys.add_attention(rows.data(), scale, visible.data(), lse.data(), num_rows, received.data(),
                       peaks == nullptr ? nullptr : most.data());
    for (int64_t j = 0; j < keys.count(); ++j) {
      scores[first + j] = received[j] / static_cast<float>(group);
    }
    if (peaks != nullptr) std::copy_n(most.begin(), keys.count(), peaks + first);
  }
}

}  // namespace

void score_window(const ScoreWindowParams& p) {
  check_indices(p);
  const auto score = [&](auto element, auto cached) {
    parallel_heads(
        p, [&](const Item& item) { score_head<decltype(element), decltype(cached)>(p, item); });
  };
  dispatch_dtypes("score_window", p.dtype, p.cache_dtype, QueryCachePairs{}, score);
}

}  // namespace ems::cpu
