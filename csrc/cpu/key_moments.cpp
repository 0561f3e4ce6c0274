// SPDX-License-Identifier: Apache-2.0

// One item per layer, row and kv_head. Products are those of keys around one of them: where keys
// have a large mean, products of them as they are would leave little but rounding when it is taken
// off.

#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/entry_checks.h"
#include "cpu/parallel.h"
#include "cpu/unturned_keys.h"
#include "launchers.h"

namespace ems::cpu {
namespace {

// Keys whose products are added at a time; they stay in the first-level cache.
constexpr int64_t kChunkKeys = 64;

template <typename T>
void moments_of_head(const KeyMomentsParams& p, const Item& item) {
  const int64_t size = p.head_size;
  const int64_t num_entries = p.num_entries[item.row];
  const bool with_products = p.products.data != nullptr;
  UnturnedKeys<T, KeyMomentsParams> keys(p, item);
  float* directions = p.directions.at(item.layer, item.row, item.head);
  std::fill(directions, directions + size, 0.0f);

  const int64_t padded = simd().padded_size(size);
  Floats origin(size), sums(size), of_chunk(size);
  Floats chunk(kChunkKeys * padded), products(with_products ? padded * padded : 0);
  if (num_entries > 0) {
    const int64_t entry = std::min(kOriginEntry, num_entries - 1);
    keys.load(entry, origin.data());
    keys.turn_back(entry, origin.data());
  }
  for (int64_t first = 0; first < num_entries; first += kChunkKeys) {
    const int64_t count = std::min(kChunkKeys, num_entries - first);
    for (int64_t i = 0; i < count; ++i) {
      float* key = chunk.data() + i * padded;
      keys.load(first + i, key);
      const float norm = std::sqrt(simd().dot(key, key, size));
      if (norm > 0) simd().add_scaled(key, size, 1.0f / norm, directions);
      if (!with_products) continue;
      keys.turn_back(first + i, key);
      simd().add_scaled(origin.data(), size, -1.0f, key);
      simd().add_scaled(key, size, 1.0f, of_chunk.data());
    }
    if (!with_products) continue;
    // Not one by one, which would round each of many keys to the size of their sum.
    simd().add_scaled(of_chunk.data(), size, 1.0f, sums.data());
    std::fill(of_chunk.begin(), of_chunk.end(), 0.0f);
    simd().add_products(chunk.data(), count, padded, products.data());
  }
  if (!with_products) return;

  float* means = p.means.at(item.layer, item.row, item.head);
  float* out = p.products.at(item.layer, item.row, item.head);
  const float weight = 1.0f / static_cast<float>(std::max<int64_t>(num_entries, 1));
  for (int64_t i = 0; i < size; ++i) {
    means[i] = origin[i] + sums[i] * weight;
    for (int64_t j = 0; j <= i; ++j) {
      out[i * size + j] = out[j * size + i] = products[i * padded + j] - sums[i] * weight * sums[j];
    }
  }
}

}  // namespace

void key_moments(const KeyMomentsParams& p) {
  check_entries("key_moments", p, p.key_cache, INT32_MAX);
  dispatch_cache_dtype(p.dtype, [&](auto element) {
    parallel_heads(p, [&](const Item& item) { moments_of_head<decltype(element)>(p, item); });
  });
}

}  // namespace ems::cpu
