// SPDX-License-Identifier: Apache-2.0

// One item per layer, group of rows and kv_head. The classes of all rows of the group are built in
// buffers and written when all of them are done, since a target slot may hold an entry that another
// class still needs, of the same row or of another one.

#include <cmath>
#include <cstring>
#include <vector>

#include "cpu/parallel.h"
#include "cpu/selection_checks.h"
#include "cpu/simd.h"
#include "dispatch.h"
#include "ems/mass.h"
#include "launchers.h"

namespace ems::cpu {
namespace {

void check_indices(const MergeCompactParams& p) {
  const IndexChecks checks("merge_compact");
  const int64_t block_size = p.key_cache.block_size;
  const int64_t capacity = p.block_table.num_columns * block_size;
  const bool has_scores = p.accumulated_pages.data != nullptr;
  const int64_t num_blocks = has_scores
                                 ? std::min(p.key_cache.num_blocks, p.accumulated_pages.num_blocks)
                                 : p.key_cache.num_blocks;
  for (int64_t row = 0; row < p.num_rows; ++row) {
    check_selection("merge_compact", p, row, std::min(capacity, p.weights.length));
    const int64_t num_targets = (p.budgets[row] + block_size - 1) / block_size;
    const int64_t first = p.target_columns[row];
    checks.in_range("target_columns", row, first, 0, p.block_table.num_columns - num_targets);
    checks.blocks("block_table", p.block_table, row, first, first + num_targets, num_blocks);
  }
}

// The entries of one class, their weights, and the sums that make up its merged key and value.
template <typename T>
class ClassMerger {
 public:
  ClassMerger(const MergeCompactParams& p, int64_t layer, int64_t row, int64_t head)
      : p_(p),
        layer_(layer),
        row_(row),
        head_(head),
        weights_(p.weights.at(layer, row, head)),
        mass_key_(p.mass_keys.data == nullptr ? nullptr : p.mass_keys.at(layer, row, head)),
        vector_(p.head_size),
        key_(p.head_size),
        value_(p.head_size) {}

  const T* key(int64_t entry) const {
    return p_.key_cache.entry<const T>(p_.block_table, row_, layer_, head_, entry);
  }
  const T* value(int64_t entry) const {
    return p_.value_cache.entry<const T>(p_.block_table, row_, layer_, head_, entry);
  }

  void merge(int64_t centre, const std::vector<int32_t>& members, T* out_key, T* out_value) {
    std::fill(key_.begin(), key_.end(), 0.0f);
    std::fill(value_.begin(), value_.end(), 0.0f);
    total_weight_ = 0;
    const float centre_norm = add(centre);
    for (const int32_t member : members) add(member);

    const int64_t size = p_.head_size;
    const float norm = std::sqrt(simd().dot(key_.data(), key_.data(), size));
    const float divisor = p_.sums_values ? weights_[centre] : total_weight_;
    const bool by_direction = p_.key_merge == KeyMerge::kDirection;
    if (divisor <= 0 || total_weight_ <= 0 || (by_direction && (norm == 0 || centre_norm == 0))) {
      std::memcpy(out_key, key(centre), size * sizeof(T));
      std::memcpy(out_value, value(centre), size * sizeof(T));
      return;
    }
    for (int64_t d = 0; d < size; ++d) from_float(value_[d] / divisor, out_value + d);
    const float mass = log_mass(weights_[centre], total_weight_, members.size());
    const bool is_centres = p_.key_merge == KeyMerge::kCentre;
    if (is_centres && (mass_key_ == nullptr || mass == 0)) {
      std::memcpy(out_key, key(centre), size * sizeof(T));
      return;
    }
    if (is_centres) {
      convert(key(centre), size, 1.0f, key_.data());
    } else {
      const float factor = by_direction ? centre_norm / norm : 1 / total_weight_;
      for (int64_t d = 0; d < size; ++d) key_[d] *= factor;
    }
    for (int64_t d = 0; d < size; ++d) {
      from_float(key_[d] + (mass_key_ == nullptr ? 0.0f : mass * mass_key_[d]), out_key + d);
    }
  }

 private:
  // Returns the norm of the entry's key.
  float add(int64_t entry) {
    const int64_t size = p_.head_size;
    const float weight = weights_[entry];
    convert(key(entry), size, 1.0f, vector_.data());
    const float norm = std::sqrt(simd().dot(vector_.data(), vector_.data(), size));
    const bool by_direction = p_.key_merge == KeyMerge::kDirection;
    if (!by_direction || norm > 0) {
      const float factor = by_direction ? weight / norm : weight;
      for (int64_t d = 0; d < size; ++d) key_[d] += factor * vector_[d];
    }
    convert(value(entry), size, 1.0f, vector_.data());
    for (int64_t d = 0; d < size; ++d) value_[d] += weight * vector_[d];
    total_weight_ += weight;
    return norm;
  }

  const MergeCompactParams& p_;
  int64_t layer_;
  int64_t row_;
  int64_t head_;
  const float* weights_;
  const float* mass_key_;
  float total_weight_ = 0;
  std::vector<float> vector_;
  std::vector<float> key_;
  std::vector<float> value_;
};

// The classes of one kv_head of a row, as they will be written.
template <typename T>
struct MergedHead {
  std::vector<T> keys;        // [budget, head_size]
  std::vector<T> values;      // [budget, head_size]
  std::vector<float> scores;  // [budget]; empty without accumulated_pages
};

template <typename T>
MergedHead<T> build_head(const MergeCompactParams& p, int64_t layer, int64_t row, int64_t head) {
  const int64_t budget = p.budgets[row];
  const int64_t size = p.head_size;
  const int32_t* kept = p.kept_idx.at(layer, row, head);
  const int32_t* merged = p.merge_idx.at(layer, row, head);
  const int32_t* classes = p.class_idx.at(layer, row, head);
  const bool has_scores = p.accumulated_pages.data != nullptr;
  const float* carry = has_scores ? p.carry.at(layer, row, head) : nullptr;

  std::vector<std::vector<int32_t>> members(budget);
  for (int64_t i = 0; i < p.merge_idx.length; ++i) {
    if (merged[i] >= 0 && 0 <= classes[i] && classes[i] < budget) {
      members[classes[i]].push_back(merged[i]);
    }
  }

  MergedHead<T> built{std::vector<T>(budget * size), std::vector<T>(budget * size),
                      std::vector<float>(has_scores ? budget : 0)};
  ClassMerger<T> merger(p, layer, row, head);
  for (int64_t rank = 0; rank < budget; ++rank) {
    T* key = built.keys.data() + rank * size;
    T* value = built.values.data() + rank * size;
    if (members[rank].empty()) {
      std::memcpy(key, merger.key(kept[rank]), size * sizeof(T));
      std::memcpy(value, merger.value(kept[rank]), size * sizeof(T));
    } else {
      merger.merge(kept[rank], members[rank], key, value);
    }
    if (has_scores) {
      float& score = built.scores[rank];
      score = carry[kept[rank]];
      for (const int32_t member : members[rank]) score += carry[member];
    }
  }
  return built;
}

template <typename T>
void write_head(const MergeCompactParams& p, int64_t layer, int64_t row, int64_t head,
                const MergedHead<T>& built) {
  const int64_t size = p.head_size;
  const int64_t block_size = p.key_cache.block_size;
  const int64_t first = p.target_columns[row] * block_size;
  for (int64_t rank = 0; rank < p.budgets[row]; ++rank) {
    const int64_t target = first + rank;
    std::memcpy(p.key_cache.entry<T>(p.block_table, row, layer, head, target),
                built.keys.data() + rank * size, size * sizeof(T));
    std::memcpy(p.value_cache.entry<T>(p.block_table, row, layer, head, target),
                built.values.data() + rank * size, size * sizeof(T));
    if (p.accumulated_pages.data != nullptr) {
      *p.accumulated_pages.entry<float>(p.block_table, row, layer, head, target) =
          built.scores[rank];
    }
  }
}

// Items whose rows are groups of rows.
struct Groups {
  int64_t num_layers;
  int64_t num_rows;
  int64_t num_kv_heads;
};

template <typename T>
void compact_group(const MergeCompactParams& p, int64_t layer, int64_t first_row, int64_t head) {
  std::vector<MergedHead<T>> built;
  built.reserve(p.rows_together);
  for (int64_t i = 0; i < p.rows_together; ++i) {
    built.push_back(build_head<T>(p, layer, first_row + i, head));
  }
  for (int64_t i = 0; i < p.rows_together; ++i) {
    write_head(p, layer, first_row + i, head, built[i]);
  }
}

}  // namespace

void merge_compact(const MergeCompactParams& p) {
  check_indices(p);
  const Groups groups{p.num_layers, p.num_rows / p.rows_together, p.num_kv_heads};
  dispatch_cache_dtype(p.dtype, [&](auto element) {
    parallel_heads(groups, [&](const Item& item) {
      compact_group<decltype(element)>(p, item.layer, item.row * p.rows_together, item.head);
    });
  });
}

}  // namespace ems::cpu
