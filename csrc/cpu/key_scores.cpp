// SPDX-License-Identifier: Apache-2.0

// One item per layer, row and kv_head: chunks of its keys against tiles of the whitening matrix.

#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/entry_checks.h"
#include "cpu/parallel.h"
#include "cpu/unturned_keys.h"
#include "launchers.h"

namespace ems::cpu {
namespace {

constexpr int64_t kChunkKeys = 32;

// The rows of a lower triangular matrix in tiles, and lengths of its products with vectors.
class Whitening {
 public:
  Whitening(const float* matrix, int64_t size)
      : size_(size),
        tiles_((size + kTileKeys - 1) / kTileKeys * kTileKeys * size),
        products_(kChunkKeys * kTileKeys) {
    Floats rows(kTileKeys * size);
    const float* each[kTileKeys];
    for (int64_t i = 0; i < kTileKeys; ++i) each[i] = rows.data() + i * size;
    for (int64_t start = 0; start < size; start += kTileKeys) {
      std::fill(rows.begin(), rows.end(), 0.0f);
      for (int64_t row = start; row < std::min(start + kTileKeys, size); ++row) {
        std::copy_n(matrix + row * size, row + 1, rows.data() + (row - start) * size);
      }
      simd().transpose(each, size, tiles_.data() + start * size);
    }
  }

  // lengths[i] = |W vector i|^2 of up to kChunkKeys vectors [num_vectors][size].
  void square_lengths(const float* vectors, int64_t num_vectors, float* lengths) {
    std::fill(lengths, lengths + num_vectors, 0.0f);
    for (int64_t start = 0; start < size_; start += kTileKeys) {
      simd().multiply(vectors, num_vectors, size_, tiles_.data() + start * size_, products_.data());
      for (int64_t i = 0; i < num_vectors; ++i) {
        const float* row = products_.data() + i * kTileKeys;
        lengths[i] += simd().dot(row, row, kTileKeys);
      }
    }
  }

 private:
  int64_t size_;
  Floats tiles_;
  Floats products_;
};

template <typename T>
void score_head(const KeyScoresParams& p, const Item& item) {
  const int64_t size = p.head_size;
  const int64_t num_entries = p.num_entries[item.row];
  UnturnedKeys<T, KeyScoresParams> keys(p, item);
  const float* directions = p.directions.at(item.layer, item.row, item.head);
  float* distinctness = p.distinctness.at(item.layer, item.row, item.head);
  const bool with_leverage = p.leverage.data != nullptr;
  const float* means = with_leverage ? p.means.at(item.layer, item.row, item.head) : nullptr;
  float* leverage = with_leverage ? p.leverage.at(item.layer, item.row, item.head) : nullptr;
  Whitening whitening(with_leverage ? p.whitening.at(item.layer, item.row, item.head) : nullptr,
                      with_leverage ? size : 0);

  const float of_directions = std::sqrt(simd().dot(directions, directions, size));
  Floats chunk(kChunkKeys * size);
  for (int64_t first = 0; first < num_entries; first += kChunkKeys) {
    const int64_t count = std::min(kChunkKeys, num_entries - first);
    for (int64_t i = 0; i < count; ++i) {
      float* key = chunk.data() + i * size;
      keys.load(first + i, key);
      const float norms = std::sqrt(simd().dot(key, key, size)) * of_directions;
      const float cosine = norms > 0 ? simd().dot(key, directions, size) / norms : 0.0f;
      distinctness[first + i] = std::max(1.0f - cosine, 0.0f);
      if (!with_leverage) continue;
      keys.turn_back(first + i, key);
      simd().add_scaled(means, size, -1.0f, key);
    }
    if (with_leverage) whitening.square_lengths(chunk.data(), count, leverage + first);
  }
  std::fill(distinctness + num_entries, distinctness + p.distinctness.length, 0.0f);
  if (with_leverage) std::fill(leverage + num_entries, leverage + p.leverage.length, 0.0f);
}

}  // namespace

void key_scores(const KeyScoresParams& p) {
  check_entries("key_scores", p, p.key_cache, p.distinctness.length);
  dispatch_cache_dtype(p.dtype, [&](auto element) {
    parallel_heads(p, [&](const Item& item) { score_head<decltype(element)>(p, item); });
  });
}

}  // namespace ems::cpu
