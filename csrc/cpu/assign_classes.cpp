// SPDX-License-Identifier: Apache-2.0

// One item per layer, row and kv_head: unit vectors of the entries to merge against tiles of unit
// vectors of the centres, once for keys and once for values, and the best product so far.

#include <cmath>
#include <vector>

#include "cpu/attention_sums.h"
#include "cpu/parallel.h"
#include "cpu/selection_checks.h"
#include "dispatch.h"
#include "launchers.h"

namespace ems::cpu {
namespace {

// A zero vector stays zero: its cosine with anything is 0.
void normalize(float* vector, int64_t length) {
  const float norm = std::sqrt(simd().dot(vector, vector, length));
  if (norm == 0) return;
  for (int64_t d = 0; d < length; ++d) vector[d] /= norm;
}

template <typename T>
class HeadUnits {
 public:
  HeadUnits(const AssignClassesParams& p, const PagedTensor& cache, const Item& item)
      : p_(p), cache_(cache), item_(item) {}

  void load(int64_t entry, float* out) const {
    const T* vector =
        cache_.entry<const T>(p_.block_table, item_.row, item_.layer, item_.head, entry);
    convert(vector, p_.head_size, 1.0f, out);
    normalize(out, p_.head_size);
  }

  std::vector<float> load_all(const int32_t* entries, int64_t count) const {
    std::vector<float> units(count * p_.head_size);
    for (int64_t i = 0; i < count; ++i) load(entries[i], units.data() + i * p_.head_size);
    return units;
  }

 private:
  const AssignClassesParams& p_;
  const PagedTensor& cache_;
  Item item_;
};

template <typename T>
void assign_head(const AssignClassesParams& p, const Item& item) {
  const int64_t layer = item.layer, row = item.row, head = item.head;
  const int32_t* kept = p.kept_idx.at(layer, row, head);
  const int32_t* merged = p.merge_idx.at(layer, row, head);
  int32_t* classes = p.class_idx.at(layer, row, head);
  const int32_t zero_class = p.budgets[row];
  const int64_t max_merges = p.merge_idx.length;
  std::fill(classes, classes + max_merges, zero_class);

  std::vector<int32_t> members, member_places;
  for (int64_t i = 0; i < max_merges; ++i) {
    if (merged[i] < 0) continue;
    members.push_back(merged[i]);
    member_places.push_back(static_cast<int32_t>(i));
  }
  const int64_t num_members = static_cast<int64_t>(members.size());
  if (num_members == 0) return;

  const HeadUnits<T> key_units(p, p.key_cache, item);
  const HeadUnits<T> value_units(p, p.value_cache, item);
  const std::vector<float> member_keys = key_units.load_all(members.data(), num_members);
  const std::vector<float> member_values = value_units.load_all(members.data(), num_members);
  std::vector<float> best(num_members, -1.0f);
  std::vector<int32_t> best_rank(num_members, zero_class);
  std::vector<float> maxima(kChunkRows);

  KeyTiles keys(p.head_size), values(p.head_size);
  for (int64_t first = 0; first < p.budgets[row]; first += KeyTiles::kMaxKeys) {
    const int64_t count = std::min(KeyTiles::kMaxKeys, p.budgets[row] - first);
    keys.pack(first, count, [&](int64_t rank, float* out) { key_units.load(kept[rank], out); });
    values.pack(first, count, [&](int64_t rank, float* out) { value_units.load(kept[rank], out); });
    for (int64_t member = 0; member < num_members; member += kChunkRows) {
      const int64_t num_rows = std::min(kChunkRows, num_members - member);
      for (int64_t start = 0; start < count; start += kTileKeys) {
        const int64_t offset = member * p.head_size;
        float* products = keys.multiply(start, member_keys.data() + offset, num_rows);
        const float* value_cos = values.multiply(start, member_values.data() + offset, num_rows);
        simd().redundancy(products, value_cos, num_rows, maxima.data());
        const int64_t num_centres = std::min(kTileKeys, count - start);
        for (int64_t i = 0; i < num_rows; ++i) {
          // Most tiles hold nothing better. The maximum may come from a centre that takes no
          // members; then the scan finds what the others offer.
          if (maxima[i] <= best[member + i]) continue;
          for (int64_t j = 0; j < num_centres; ++j) {
            const float redundancy = products[i * kTileKeys + j];
            const int64_t rank = first + start + j;
            if (redundancy > best[member + i] && kept[rank] >= p.num_protected[row]) {
              best[member + i] = redundancy;
              best_rank[member + i] = static_cast<int32_t>(rank);
            }
          }
        }
      }
    }
  }
  for (int64_t i = 0; i < num_members; ++i) {
    if (best[i] >= p.similarity_threshold) classes[member_places[i]] = best_rank[i];
  }
}

}  // namespace

void assign_classes(const AssignClassesParams& p) {
  const int64_t max_entries = p.block_table.num_columns * p.key_cache.block_size;
  for (int64_t row = 0; row < p.num_rows; ++row) {
    check_selection("assign_classes", p, row, max_entries);
  }
  dispatch_cache_dtype(p.dtype, [&](auto element) {
    parallel_heads(p, [&](const Item& item) { assign_head<decltype(element)>(p, item); });
  });
}

}  // namespace ems::cpu
