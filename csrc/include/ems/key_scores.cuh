// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cmath>
#include <cstdint>

#include "ems/attention_sums.cuh"
#include "ems/items.h"
#include "ems/params.h"
#include "ems/split_tile.cuh"
#include "ems/unturned_key.cuh"

// key_scores: centred keys stay in registers, rows of the whitening matrix stream past, and squares
// of their products are summed at once.
namespace ems {

// A warp has 16 keys; rows of the matrix are multiplied with all keys of a CTA.
template <int HEAD_SIZE>
struct KeyScoresShape {
  static constexpr int kWarps = HEAD_SIZE > 128 ? 4 : 8;
  static constexpr int kThreads = kWarps * device::kWarpSize;
  static constexpr int kKeys = 16 * kWarps;
  static constexpr int kRows = 16;
};

template <int HEAD_SIZE>
struct KeyScoresShared {
  using Shape = KeyScoresShape<HEAD_SIZE>;
  SplitTile<HEAD_SIZE, Shape::kKeys> keys;
  SplitTile<HEAD_SIZE, Shape::kRows> rows;
  int64_t offsets[Shape::kKeys];
};

// CTA (x, item): keys x * kKeys.. of item first_item + y.
template <typename C, int HEAD_SIZE>
EMS_KERNEL((KeyScoresShape<HEAD_SIZE>::kThreads), 1)
key_scores_kernel(KeyScoresParams p, int64_t first_item) {
  using Shape = KeyScoresShape<HEAD_SIZE>;
  auto& shared = device::shared_memory<KeyScoresShared<HEAD_SIZE>>();
  const int thread = device::thread_index();
  const int lane = thread % device::kWarpSize;
  const int warp = thread / device::kWarpSize;
  const Item item = item_at(p, first_item + device::cta_y());
  const int64_t num_entries = p.num_entries[item.row];
  const int64_t first = device::cta_x() * Shape::kKeys;
  const bool with_leverage = p.leverage.data != nullptr && first < num_entries;
  const PagedKeys paged{p.key_cache, p.block_table, item.layer, item.row, item.head};
  const auto* data = static_cast<const C*>(p.key_cache.data);
  for (int i = thread; i < Shape::kKeys; i += Shape::kThreads) {
    shared.offsets[i] = first + i < num_entries ? paged.offset(first + i) : -1;
  }
  device::sync_cta();

  UnturnedKey<HEAD_SIZE> direction, mean;
  direction.load(p.rotation, p.directions.at(item.layer, item.row, item.head));
  const float of_direction = direction.dot(direction);
  mean.clear();
  if (with_leverage) mean.load(p.rotation, p.means.at(item.layer, item.row, item.head));
  // Of key lane % 16 of this warp.
  float own_distinctness = 0;
#pragma unroll 2
  for (int i = 0; i < 16; ++i) {
    const int place = 16 * warp + i;
    UnturnedKey<HEAD_SIZE> key;
    key.clear();
    if (shared.offsets[place] >= 0) {
      key.load(p.rotation, data + shared.offsets[place]);
      const float norms = sqrtf(key.dot(key)) * sqrtf(of_direction);
      const float cosine = norms > 0 ? key.dot(direction) / norms : 0.0f;
      if (i == lane % 16) own_distinctness = fmaxf(1.0f - cosine, 0.0f);
      key.turn_back(p.rotation, first + place);
      key.add(mean, -1.0f);
    }
    if (!with_leverage) continue;
    key.for_pairs(p.rotation, [&](int k, KeyPair pair) {
      shared.keys.set(place, pair.first, key.first[k]);
      shared.keys.set(place, pair.second, key.second[k]);
    });
  }
  const int64_t entry = first + 16 * warp + lane % 16;
  if (lane < 16 && entry < p.distinctness.length) {
    p.distinctness.at(item.layer, item.row, item.head)[entry] = own_distinctness;
  }
  if (p.leverage.data == nullptr) return;

  // Of keys lane / 4 and lane / 4 + 8 of the warp, over the columns of this lane.
  float squares[2] = {0.0f, 0.0f};
  if (with_leverage) {
    device::sync_warp();
    SplitFragment keys[HEAD_SIZE / 16];
#pragma unroll
    for (int k = 0; k < HEAD_SIZE / 16; ++k) {
      shared.keys.load_left(16 * warp, 16 * k, &keys[k]);
    }
    const float* matrix = p.whitening.at(item.layer, item.row, item.head);
    for (int row = 0; row < HEAD_SIZE; row += Shape::kRows) {
      // Up to the diagonal, in whole squares of 16.
      const int num_columns = row + Shape::kRows;
      device::sync_cta();
      for (int r = warp; r < Shape::kRows; r += Shape::kWarps) {
        for (int column = lane; column < num_columns; column += device::kWarpSize) {
          const float value = matrix[(row + r) * HEAD_SIZE + column];
          shared.rows.set(r, column, column <= row + r ? value : 0.0f);
        }
      }
      device::sync_cta();
      float white[2][4] = {};
#pragma unroll
      for (int k = 0; k < HEAD_SIZE / 16; ++k) {
        if (16 * k > row) continue;
        SplitFragment rows;
        shared.rows.load_right(0, 16 * k, &rows);
        multiply_add_split(white[0], keys[k], rows, 0);
        multiply_add_split(white[1], keys[k], rows, 1);
      }
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        squares[k / 2] += white[0][k] * white[0][k] + white[1][k] * white[1][k];
      }
    }
  }
  float* leverage = p.leverage.at(item.layer, item.row, item.head);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float square = squares[half];
    square += device::shuffle_xor(square, 1);
    square += device::shuffle_xor(square, 2);
    const int64_t own = first + 16 * warp + lane / 4 + 8 * half;
    if (lane % 4 == 0 && own < p.leverage.length) leverage[own] = square;
  }
}

}  // namespace ems
