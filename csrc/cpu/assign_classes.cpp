// SPDX-License-Identifier: Apache-2.0

// One item per layer, row and kv_head: the entries to merge against tiles of the centres, once for
// keys and once for values, and the best redundancy so far. Products are of vectors as they are and
// divided by norms afterwards, so that those of bfloat16 need no conversion.

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "cpu/attention_sums.h"
#include "cpu/parallel.h"
#include "cpu/selection_checks.h"
#include "dispatch.h"
#include "launchers.h"

namespace ems::cpu {
namespace {

// The keys or the values of one head as factors, and their inverse norms.
template <typename T>
class HeadVectors {
 public:
  HeadVectors(const AssignClassesParams& p, const PagedTensor& cache, const Item& item)
      : p_(p), cache_(cache), item_(item), factors_(p.head_size), floats_(p.head_size) {}

  const Factors<T, T>& factors() const { return factors_; }
  int64_t num_words() const { return factors_.num_words(); }

  const T* at(int64_t entry) const {
    return cache_.entry<const T>(p_.block_table, item_.row, item_.layer, item_.head, entry);
  }

  // 0 of a vector that is as good as zero, whose cosine with anything is 0.
  float inverse_norm(const T* vector) {
    const float* floats = floats_.data();
    if constexpr (std::is_same_v<T, float>) {
      floats = vector;
    } else {
      convert(vector, p_.head_size, 1.0f, floats_.data());
    }
    const float norm = std::sqrt(simd().dot(floats, floats, p_.head_size));
    return norm > 1e-30f ? 1.0f / norm : 0.0f;
  }

 private:
  const AssignClassesParams& p_;
  const PagedTensor& cache_;
  Item item_;
  Factors<T, T> factors_;
  Floats floats_;
};

// Vectors of the entries to merge, and their inverse norms.
template <typename T>
struct Members {
  Floats rows;
  Floats by_norm;

  Members(HeadVectors<T>& vectors, const std::vector<int32_t>& entries)
      : rows(entries.size() * vectors.num_words()), by_norm(entries.size()) {
    for (size_t i = 0; i < entries.size(); ++i) {
      const T* vector = vectors.at(entries[i]);
      vectors.factors().load(vector, rows.data() + i * vectors.num_words());
      by_norm[i] = vectors.inverse_norm(vector);
    }
  }
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

  HeadVectors<T> key_vectors(p, p.key_cache, item);
  HeadVectors<T> value_vectors(p, p.value_cache, item);
  const Members<T> member_keys(key_vectors, members);
  const Members<T> member_values(value_vectors, members);
  Floats best(num_members, -1.0f);
  std::vector<int32_t> best_rank(num_members, zero_class);
  Floats maxima(kChunkRows);

  KeyTiles keys(key_vectors.factors()), values(value_vectors.factors());
  Floats by_norms(KeyTiles::kMaxKeys);
  for (int64_t first = 0; first < p.budgets[row]; first += KeyTiles::kMaxKeys) {
    const int64_t count = std::min(KeyTiles::kMaxKeys, p.budgets[row] - first);
    std::fill(by_norms.begin(), by_norms.begin() + count, 1.0f);
    const auto pack = [&](HeadVectors<T>& vectors, KeyTiles* tiles) {
      tiles->pack(first, count, [&](int64_t rank, float* scratch) {
        const T* vector = vectors.at(kept[rank]);
        by_norms[rank - first] *= vectors.inverse_norm(vector);
        return vectors.factors().view(vector, scratch);
      });
    };
    pack(key_vectors, &keys);
    pack(value_vectors, &values);
    for (int64_t member = 0; member < num_members; member += kChunkRows) {
      const int64_t num_rows = std::min(kChunkRows, num_members - member);
      for (int64_t start = 0; start < count; start += kTileKeys) {
        const int64_t offset = member * key_vectors.num_words();
        float* products = keys.multiply(start, member_keys.rows.data() + offset, num_rows);
        const float* of_values =
            values.multiply(start, member_values.rows.data() + offset, num_rows);
        simd().redundancy(products, of_values, member_keys.by_norm.data() + member,
                          member_values.by_norm.data() + member, by_norms.data() + start, num_rows,
                          maxima.data());
        const int64_t num_centres = std::min(kTileKeys, count - start);
        for (int64_t i = 0; i < num_rows; ++i) {
          // Most tiles hold nothing better.
          if (maxima[i] <= best[member + i]) continue;
          const float* redundancies = products + i * kTileKeys;
          const auto take = [&](int64_t j) {
            best[member + i] = redundancies[j];
            best_rank[member + i] = static_cast<int32_t>(first + start + j);
          };
          const auto takes_members = [&](int64_t j) {
            return kept[first + start + j] >= p.num_protected[row];
          };
          const int64_t largest =
              std::find(redundancies, redundancies + num_centres, maxima[i]) - redundancies;
          if (largest < num_centres && takes_members(largest)) {
            take(largest);
            continue;
          }
          // The maximum is of a centre that takes no members: what do the others offer?
          for (int64_t j = 0; j < num_centres; ++j) {
            if (redundancies[j] > best[member + i] && takes_members(j)) take(j);
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
