// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cmath>
#include <cstdint>

#include "ems/cta.cuh"
#include "ems/items.h"
#include "ems/mass.h"
#include "ems/params.h"
#include "ems/vector.h"

// merge_compact in three kernels: the members of every class are listed, every class is merged into
// a staging buffer, and the staging buffer is written to the target columns. Staged, because a
// target slot may hold an entry that another class still needs, of the same row or of another one
// of its group; in batches of whole groups that fit the second-level cache, so that the detour
// costs little memory traffic.
namespace ems {

constexpr int kGroupThreads = 256;
constexpr int32_t kMaxSharedMembers = 4096;

// Members of an item, ordered by class and within a class by rank, and where each class begins.
struct ClassLists {
  int32_t* members;  // [items, max_merges] entries
  int32_t* starts;   // [items, max_budget + 1]; starts[budget] ends the last class
};

// CTA x: item first_item + x. sort_scratch as in select_entries_kernel.
inline EMS_KERNEL(kGroupThreads, 2)
    group_members_kernel(MergeCompactParams p, int64_t first_item, ClassLists lists,
                         int32_t sort_len, uint64_t* sort_scratch) {
  uint64_t* keys = sort_len <= kMaxSharedMembers ? &device::shared_memory<uint64_t>()
                                                 : sort_scratch + device::cta_x() * sort_len;
  const int thread = device::thread_index();
  const Item item = item_at(p, first_item + device::cta_x());
  const int32_t budget = p.budgets[item.row];
  const int32_t* merged = p.merge_idx.at(item.layer, item.row, item.head);
  const int32_t* classes = p.class_idx.at(item.layer, item.row, item.head);
  int32_t* members = lists.members + device::cta_x() * p.merge_idx.length;
  int32_t* starts = lists.starts + device::cta_x() * (p.kept_idx.length + 1);

  for (int32_t i = thread; i < sort_len; i += kGroupThreads) {
    const bool is_member =
        i < p.merge_idx.length && merged[i] >= 0 && 0 <= classes[i] && classes[i] < budget;
    const int32_t group = is_member ? classes[i] : budget;
    keys[i] = static_cast<uint64_t>(group) << 32 | static_cast<uint32_t>(i);
  }
  device::sync_cta();
  sort_keys<kGroupThreads>(keys, sort_len);
  for (int32_t i = thread; i <= sort_len; i += kGroupThreads) {
    // Position i begins every class after the one before it, up to its own.
    const int32_t before = i == 0 ? -1 : static_cast<int32_t>(keys[i - 1] >> 32);
    const int32_t own = i == sort_len ? budget : static_cast<int32_t>(keys[i] >> 32);
    for (int32_t group = before + 1; group <= own; ++group) starts[group] = i;
    if (own < budget) members[i] = merged[static_cast<uint32_t>(keys[i])];
  }
}

// A key and a value, spread over the lanes of a warp in vectors of 16 bytes.
template <typename T, int HEAD_SIZE>
struct EntryLayout {
  static constexpr int kPerVector = 16 / static_cast<int>(sizeof(T));
  static constexpr int kKeyVectors = HEAD_SIZE / kPerVector;
  static constexpr int kVectors = 2 * kKeyVectors;
  static constexpr int kPerLane = (kVectors + device::kWarpSize - 1) / device::kWarpSize;
};

// Staged classes: [items, max_budget] of a key and a value, and their scores.
template <typename T>
struct Staging {
  T* entries;     // [items, max_budget, 2, head_size]
  float* scores;  // [items, max_budget]
};

template <typename T, int HEAD_SIZE>
class EntryReader {
  using Layout = EntryLayout<T, HEAD_SIZE>;

 public:
  Vector16 vectors[Layout::kPerLane];

  EMS_DEVICE void load(const MergeCompactParams& p, const Item& item, int32_t entry) {
    const T* key =
        p.key_cache.entry<const T>(p.block_table, item.row, item.layer, item.head, entry);
    const T* value =
        p.value_cache.entry<const T>(p.block_table, item.row, item.layer, item.head, entry);
#pragma unroll
    for (int i = 0; i < Layout::kPerLane; ++i) {
      const int index = vector_index(i);
      if (index >= Layout::kVectors) continue;
      const T* source = is_key(i) ? key + index * Layout::kPerVector
                                  : value + (index - Layout::kKeyVectors) * Layout::kPerVector;
      vectors[i] = *reinterpret_cast<const Vector16*>(source);
    }
  }

  static EMS_DEVICE int vector_index(int i) {
    return i * device::kWarpSize + device::thread_index() % device::kWarpSize;
  }
  static EMS_DEVICE bool is_key(int i) { return vector_index(i) < Layout::kKeyVectors; }
  static EMS_DEVICE bool exists(int i) { return vector_index(i) < Layout::kVectors; }

  EMS_DEVICE float element(int i, int j) const {
    return device::widen(reinterpret_cast<const T*>(vectors[i].words)[j]);
  }
};

constexpr int kMergeThreads = 256;

// Warp of CTA (x, item): one class of item first_item + y.
template <typename T, int HEAD_SIZE>
EMS_KERNEL(kMergeThreads, 2)
merge_classes_kernel(MergeCompactParams p, int64_t first_item, ClassLists lists,
                     Staging<T> staging) {
  using Layout = EntryLayout<T, HEAD_SIZE>;
  using Reader = EntryReader<T, HEAD_SIZE>;
  const Item item = item_at(p, first_item + device::cta_y());
  const int lane = device::thread_index() % device::kWarpSize;
  const int64_t rank = device::cta_x() * (kMergeThreads / device::kWarpSize) +
                       device::thread_index() / device::kWarpSize;
  if (rank >= p.budgets[item.row]) return;
  const int32_t centre = p.kept_idx.at(item.layer, item.row, item.head)[rank];
  const int32_t* starts = lists.starts + device::cta_y() * (p.kept_idx.length + 1) + rank;
  const int32_t* members = lists.members + device::cta_y() * p.merge_idx.length;
  const int32_t first = lists.starts == nullptr ? 0 : starts[0];
  const int32_t end = lists.starts == nullptr ? 0 : starts[1];
  const int64_t place = device::cta_y() * p.kept_idx.length + rank;

  Reader reader;
  reader.load(p, item, centre);
  if (first < end) {
    const Reader unchanged = reader;
    const float* weights = p.weights.at(item.layer, item.row, item.head);
    float sums[Layout::kPerLane][Layout::kPerVector] = {};
    float total_weight = 0;
    float centre_norm = 0;
    const bool by_direction = p.key_merge == KeyMerge::kDirection;
    for (int32_t i = first - 1; i < end; ++i) {
      const bool is_centre = i == first - 1;
      if (!is_centre) reader.load(p, item, members[i]);
      const float weight = weights[is_centre ? centre : members[i]];
      float square = 0;
#pragma unroll
      for (int v = 0; v < Layout::kPerLane; ++v) {
        if (!Reader::is_key(v)) continue;
#pragma unroll
        for (int j = 0; j < Layout::kPerVector; ++j) {
          square += reader.element(v, j) * reader.element(v, j);
        }
      }
      const float norm = sqrtf(sum_of_warp(square));
      if (is_centre) centre_norm = norm;
      const float key_factor = !by_direction ? weight : norm > 0 ? weight / norm : 0.0f;
#pragma unroll
      for (int v = 0; v < Layout::kPerLane; ++v) {
        if (!Reader::exists(v)) continue;
        const float factor = Reader::is_key(v) ? key_factor : weight;
#pragma unroll
        for (int j = 0; j < Layout::kPerVector; ++j) sums[v][j] += factor * reader.element(v, j);
      }
      total_weight += weight;
    }
    float square = 0;
#pragma unroll
    for (int v = 0; v < Layout::kPerLane; ++v) {
      if (!Reader::is_key(v)) continue;
#pragma unroll
      for (int j = 0; j < Layout::kPerVector; ++j) square += sums[v][j] * sums[v][j];
    }
    const float norm = sqrtf(sum_of_warp(square));
    const float divisor = p.sums_values ? weights[centre] : total_weight;
    if (divisor <= 0 || total_weight <= 0 || (by_direction && (norm == 0 || centre_norm == 0))) {
      reader = unchanged;
    } else {
      reader = unchanged;
      const float mass = log_mass(weights[centre], total_weight, end - first);
      const float* mass_key =
          p.mass_keys.data == nullptr ? nullptr : p.mass_keys.at(item.layer, item.row, item.head);
      const bool is_centres = p.key_merge == KeyMerge::kCentre;
      const bool changes_key = !is_centres || (mass_key != nullptr && mass != 0);
      const float factor = by_direction ? centre_norm / norm : 1 / total_weight;
#pragma unroll
      for (int v = 0; v < Layout::kPerLane; ++v) {
        if (!Reader::exists(v) || (Reader::is_key(v) && !changes_key)) continue;
        T* elements = reinterpret_cast<T*>(reader.vectors[v].words);
#pragma unroll
        for (int j = 0; j < Layout::kPerVector; ++j) {
          float number = sums[v][j] / divisor;
          if (Reader::is_key(v)) {
            number = is_centres ? unchanged.element(v, j) : sums[v][j] * factor;
            if (mass_key != nullptr) {
              number += mass * mass_key[Reader::vector_index(v) * Layout::kPerVector + j];
            }
          }
          elements[j] = device::round_to<T>(number);
        }
      }
    }
  }
  auto* out = reinterpret_cast<Vector16*>(staging.entries + place * 2 * HEAD_SIZE);
#pragma unroll
  for (int v = 0; v < Layout::kPerLane; ++v) {
    if (Reader::exists(v)) out[Reader::vector_index(v)] = reader.vectors[v];
  }
  if (staging.scores != nullptr && lane == 0) {
    const float* carry = p.carry.at(item.layer, item.row, item.head);
    float score = carry[centre];
    for (int32_t i = first; i < end; ++i) score += carry[members[i]];
    staging.scores[place] = score;
  }
}

// Thread of CTA (x, item): one vector of a staged class of item first_item + y, and the score with
// the first of them.
template <typename T, int HEAD_SIZE>
EMS_KERNEL(kMergeThreads, 2)
write_targets_kernel(MergeCompactParams p, int64_t first_item, Staging<T> staging) {
  using Layout = EntryLayout<T, HEAD_SIZE>;
  const Item item = item_at(p, first_item + device::cta_y());
  const int64_t index = device::cta_x() * kMergeThreads + device::thread_index();
  const int64_t rank = index / Layout::kVectors;
  const int vector = static_cast<int>(index % Layout::kVectors);
  if (rank >= p.budgets[item.row]) return;
  const int64_t place = device::cta_y() * p.kept_idx.length + rank;
  const int64_t target = p.target_columns[item.row] * p.key_cache.block_size + rank;
  const bool is_key = vector < Layout::kKeyVectors;
  T* to = is_key ? p.key_cache.entry<T>(p.block_table, item.row, item.layer, item.head, target)
                 : p.value_cache.entry<T>(p.block_table, item.row, item.layer, item.head, target);
  const auto* from = reinterpret_cast<const Vector16*>(staging.entries + place * 2 * HEAD_SIZE);
  reinterpret_cast<Vector16*>(to)[is_key ? vector : vector - Layout::kKeyVectors] = from[vector];
  if (vector == 0 && staging.scores != nullptr) {
    *p.accumulated_pages.entry<float>(p.block_table, item.row, item.layer, item.head, target) =
        staging.scores[place];
  }
}

}  // namespace ems
