// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cmath>
#include <cstdint>

#include "ems/attention_sums.cuh"
#include "ems/cta.cuh"
#include "ems/items.h"
#include "ems/params.h"
#include "ems/tile.cuh"

// assign_classes: products of the entries to be merged (they stay) with the centres (they stream
// past), of keys and of values at once; the best centre so far stays in registers.
namespace ems {

// As many members as fit beside two tiles of centres: the more, the less often centres are read.
template <typename T, int HEAD_SIZE>
struct AssignShape {
  static constexpr bool kIsFloat = sizeof(T) == 4;
  static constexpr int kWarps = kIsFloat ? 2 : HEAD_SIZE > 128 ? 3 : 4;
  static constexpr int kThreads = kWarps * device::kWarpSize;
  static constexpr int kMembers = 16 * kWarps;
  static constexpr int kFloatCentres = HEAD_SIZE > 128 ? 8 : 16;
  static constexpr int kHalfCentres = HEAD_SIZE > 128 ? 16 : HEAD_SIZE == 128 ? 32 : 64;
  static constexpr int kCentres = kIsFloat ? kFloatCentres : kHalfCentres;
};

// What is looked up of a centre; the inverse of its key's norm is kNoMembers when it takes none.
struct Centre {
  int64_t key_offset;
  int64_t value_offset;
  float key_inverse;
  float value_inverse;
};
constexpr float kNoMembers = -1.0f;

template <typename T, int HEAD_SIZE>
struct AssignShared {
  using Shape = AssignShape<T, HEAD_SIZE>;
  Tile<T, HEAD_SIZE, Shape::kMembers> member_keys;
  Tile<T, HEAD_SIZE, Shape::kMembers> member_values;
  Tile<T, HEAD_SIZE, Shape::kCentres> centre_keys[2];
  Tile<T, HEAD_SIZE, Shape::kCentres> centre_values[2];
  int64_t member_key_offsets[Shape::kMembers];
  int64_t member_value_offsets[Shape::kMembers];
  int64_t centre_key_offsets[3][Shape::kCentres];
  int64_t centre_value_offsets[3][Shape::kCentres];
  float key_inverses[3][Shape::kCentres];
  float value_inverses[3][Shape::kCentres];
  bool is_member[Shape::kMembers];
  int32_t has_members;
};

template <typename T, int HEAD_SIZE>
EMS_DEVICE float inverse_norm_by_warp(const T* vector) {
  float sum = 0;
  for (int d = device::thread_index() % device::kWarpSize; d < HEAD_SIZE; d += device::kWarpSize) {
    const float x = device::widen(vector[d]);
    sum += x * x;
  }
  sum = sum_of_warp(sum);
  return sum > 0 ? 1.0f / sqrtf(sum) : 0.0f;
}

constexpr int kNormThreads = 256;

// Warp of CTA (x, item): one centre of item first_item + y. inverses: [items, 2, max_budget]; keys'
// first.
template <typename C, int HEAD_SIZE>
EMS_KERNEL(kNormThreads, 1)
centre_norms_kernel(AssignClassesParams p, int64_t first_item, float* inverses) {
  const Item item = item_at(p, first_item + device::cta_y());
  const int64_t rank = device::cta_x() * (kNormThreads / device::kWarpSize) +
                       device::thread_index() / device::kWarpSize;
  if (rank >= p.budgets[item.row]) return;
  const int32_t entry = p.kept_idx.at(item.layer, item.row, item.head)[rank];
  const float key = inverse_norm_by_warp<C, HEAD_SIZE>(
      p.key_cache.entry<const C>(p.block_table, item.row, item.layer, item.head, entry));
  const float value = inverse_norm_by_warp<C, HEAD_SIZE>(
      p.value_cache.entry<const C>(p.block_table, item.row, item.layer, item.head, entry));
  if (device::thread_index() % device::kWarpSize != 0) return;
  float* out = inverses + device::cta_y() * 2 * p.kept_idx.length;
  out[rank] = entry < p.num_protected[item.row] ? kNoMembers : key;
  out[p.kept_idx.length + rank] = value;
}

// CTA (x, item): members x * kMembers.. of item first_item + y. T is the type of the arithmetic, C
// that of the cache: T, or float8.
template <typename T, int HEAD_SIZE, typename C>
EMS_KERNEL((AssignShape<T, HEAD_SIZE>::kThreads), 1)
assign_classes_kernel(AssignClassesParams p, int64_t first_item, const float* inverses) {
  using Shape = AssignShape<T, HEAD_SIZE>;
  constexpr int kCentres = Shape::kCentres;
  auto& shared = device::shared_memory<AssignShared<T, HEAD_SIZE>>();
  const int thread = device::thread_index();
  const int lane = thread % device::kWarpSize;
  const int warp = thread / device::kWarpSize;
  const Item item = item_at(p, first_item + device::cta_y());
  const int64_t first_member = device::cta_x() * Shape::kMembers;
  const int32_t* kept = p.kept_idx.at(item.layer, item.row, item.head);
  const int32_t* merged = p.merge_idx.at(item.layer, item.row, item.head);
  int32_t* classes = p.class_idx.at(item.layer, item.row, item.head);
  const int32_t num_centres = p.budgets[item.row];
  const float* key_inverses = inverses + device::cta_y() * 2 * p.kept_idx.length;
  const float* value_inverses = key_inverses + p.kept_idx.length;
  const PagedKeys keys{p.key_cache, p.block_table, item.layer, item.row, item.head};
  const PagedKeys values{p.value_cache, p.block_table, item.layer, item.row, item.head};

  if (thread == 0) shared.has_members = 0;
  device::sync_cta();
  for (int i = thread; i < Shape::kMembers; i += Shape::kThreads) {
    const int64_t member = first_member + i;
    const int32_t entry = member < p.merge_idx.length ? merged[member] : -1;
    shared.is_member[i] = entry >= 0;
    shared.member_key_offsets[i] = entry < 0 ? 0 : keys.offset(entry);
    shared.member_value_offsets[i] = entry < 0 ? 0 : values.offset(entry);
    if (entry >= 0) device::max_shared(&shared.has_members, 1);
  }
  device::sync_cta();
  const int32_t num_tiles = shared.has_members == 0 ? 0 : (num_centres + kCentres - 1) / kCentres;

  static_assert(kCentres <= Shape::kThreads);
  const auto look_up = [&](int32_t tile) -> Centre {
    const int32_t rank = tile * kCentres + thread;
    if (thread >= kCentres || rank >= num_centres) return {0, 0, kNoMembers, 0.0f};
    return {keys.offset(kept[rank]), values.offset(kept[rank]), key_inverses[rank],
            value_inverses[rank]};
  };
  const auto store = [&](int32_t tile, const Centre& centre) {
    if (thread >= kCentres) return;
    shared.centre_key_offsets[tile % 3][thread] = centre.key_offset;
    shared.centre_value_offsets[tile % 3][thread] = centre.value_offset;
    shared.key_inverses[tile % 3][thread] = centre.key_inverse;
    shared.value_inverses[tile % 3][thread] = centre.value_inverse;
  };
  const auto fetch = [&](int32_t tile) {
    shared.centre_keys[tile % 2].template gather<Shape::kThreads>(
        static_cast<const C*>(p.key_cache.data), shared.centre_key_offsets[tile % 3]);
    shared.centre_values[tile % 2].template gather<Shape::kThreads>(
        static_cast<const C*>(p.value_cache.data), shared.centre_value_offsets[tile % 3]);
    device::commit_copies();
  };
  if (num_tiles > 0) {
    store(0, look_up(0));
    store(1, look_up(1));
    device::sync_cta();
    shared.member_keys.template gather<Shape::kThreads>(static_cast<const C*>(p.key_cache.data),
                                                        shared.member_key_offsets);
    shared.member_values.template gather<Shape::kThreads>(static_cast<const C*>(p.value_cache.data),
                                                          shared.member_value_offsets);
    fetch(0);
  }

  // Of members lane / 4 and lane / 4 + 8 of the warp, over the columns of this lane. The products
  // leave out the members' own norms, which do not change the order.
  float best[2] = {-1.0f, -1.0f};
  int32_t best_rank[2] = {num_centres, num_centres};
  LeftRows<T, HEAD_SIZE, 1> left_keys, left_values;
  Products<1, kCentres> key_products, value_products;
  for (int32_t tile = 0; tile < num_tiles; ++tile) {
    device::wait_for_copies<0>();
    device::sync_cta();
    if (tile + 1 < num_tiles) fetch(tile + 1);
    const Centre looked_up = look_up(tile + 2);
    if (tile == 0) {
      left_keys.load(shared.member_keys, warp * 16);
      left_values.load(shared.member_values, warp * 16);
    }
    left_keys.multiply(shared.centre_keys[tile % 2], &key_products);
    left_values.multiply(shared.centre_values[tile % 2], &value_products);
    // Not before the products, which it would wait in front of.
    store(tile + 2, looked_up);
#pragma unroll
    for (int j = 0; j < kCentres / 8; ++j) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int column = 8 * j + 2 * (lane % 4) + k % 2;
        const float key_inverse = shared.key_inverses[tile % 3][column];
        const float key_part = key_products.values[0][j][k] * key_inverse;
        const float value_part =
            value_products.values[0][j][k] * shared.value_inverses[tile % 3][column];
        const float product =
            key_inverse == kNoMembers ? -1.0f : fmaxf(key_part, 0.0f) * fmaxf(value_part, 0.0f);
        if (product > best[k / 2]) {
          best[k / 2] = product;
          best_rank[k / 2] = tile * kCentres + column;
        }
      }
    }
  }

#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int mask = 1; mask <= 2; mask *= 2) {
      const float other = device::shuffle_xor(best[half], mask);
      const int32_t other_rank = device::shuffle_xor(best_rank[half], mask);
      if (other > best[half] || (other == best[half] && other_rank < best_rank[half])) {
        best[half] = other;
        best_rank[half] = other_rank;
      }
    }
  }
  for (int i = 0; i < 16; ++i) {
    const int row = warp * 16 + i;
    const bool is_member = num_tiles > 0 && shared.is_member[row];
    float inverse = 0;
    if (is_member) {
      inverse = inverse_norm_by_warp<T, HEAD_SIZE>(shared.member_keys.row(row)) *
                inverse_norm_by_warp<T, HEAD_SIZE>(shared.member_values.row(row));
    }
    if (lane != i % 8 * 4 || first_member + row >= p.merge_idx.length) continue;
    // Not indexed by i / 8, which would move the arrays to local memory.
    const float redundancy = (i < 8 ? best[0] : best[1]) * inverse;
    const bool fits = is_member && redundancy >= p.similarity_threshold;
    classes[first_member + row] = !fits ? num_centres : i < 8 ? best_rank[0] : best_rank[1];
  }
}

}  // namespace ems
