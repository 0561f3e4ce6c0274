// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cmath>
#include <cstdint>

#include "ems/attention_sums.cuh"
#include "ems/items.h"
#include "ems/params.h"
#include "ems/split_tile.cuh"
#include "ems/unturned_key.cuh"

// key_moments in two kernels: sums over a part of an item's keys, whose products stay in registers
// while the keys stream past, and the sums of the parts, in their order. Products are those of keys
// around one of them: where keys have a large mean, products of them as they are would leave little
// but rounding when it is taken off.
namespace ems {

// A CTA holds a block of the products, a warp 16 of its rows. A block is all of them up to a head
// size of 128.
template <int HEAD_SIZE>
struct MomentsShape {
  static constexpr int kBlock = HEAD_SIZE > 128 ? 128 : HEAD_SIZE;
  static constexpr int kBlocksPerSide = HEAD_SIZE / kBlock;
  // Those on and below the diagonal.
  static constexpr int kBlocks = kBlocksPerSide * (kBlocksPerSide + 1) / 2;
  static constexpr int kWarps = kBlock / 16;
  static constexpr int kThreads = kWarps * device::kWarpSize;
  static constexpr int kKeys = HEAD_SIZE > 128 ? 32 : 64;
  static constexpr int kMinCtas = HEAD_SIZE > 128 ? 1 : 2;
};

// Of one part of an item's keys, around the item's origin: products on and below the diagonal, sums
// of keys, and sums of directions.
template <int HEAD_SIZE>
struct MomentsPart {
  float products[HEAD_SIZE * HEAD_SIZE];
  float sums[HEAD_SIZE];
  float directions[HEAD_SIZE];
};

template <int HEAD_SIZE>
struct MomentsShared {
  using Shape = MomentsShape<HEAD_SIZE>;
  SplitTile<HEAD_SIZE, Shape::kKeys> keys;
  int64_t offsets[Shape::kKeys];
  float sums[Shape::kWarps][HEAD_SIZE];
  float directions[Shape::kWarps][HEAD_SIZE];
};

// The key of an item that products are taken around.
template <typename C, int HEAD_SIZE>
EMS_DEVICE void load_origin(const KeyMomentsParams& p, const PagedKeys& keys, int64_t num_entries,
                            UnturnedKey<HEAD_SIZE>* origin) {
  const int64_t entry = num_entries > kOriginEntry ? kOriginEntry : num_entries - 1;
  origin->load(p.rotation, static_cast<const C*>(p.key_cache.data) + keys.offset(entry));
  origin->turn_back(p.rotation, entry);
}

// CTA (part, item, block): keys part * keys_per_part.. of item first_item + y, one block of the
// products. parts: [items, num_parts].
template <typename C, int HEAD_SIZE>
EMS_KERNEL((MomentsShape<HEAD_SIZE>::kThreads), (MomentsShape<HEAD_SIZE>::kMinCtas))
key_moments_kernel(KeyMomentsParams p, int64_t first_item, int64_t keys_per_part, int64_t num_parts,
                   MomentsPart<HEAD_SIZE>* parts) {
  using Shape = MomentsShape<HEAD_SIZE>;
  auto& shared = device::shared_memory<MomentsShared<HEAD_SIZE>>();
  const int thread = device::thread_index();
  const int lane = thread % device::kWarpSize;
  const int warp = thread / device::kWarpSize;
  const Item item = item_at(p, first_item + device::cta_y());
  const int64_t num_entries = p.num_entries[item.row];
  const int64_t first = device::cta_x() * keys_per_part;
  if (first >= num_entries) return;
  const int64_t end = first + keys_per_part < num_entries ? first + keys_per_part : num_entries;
  const bool with_products = p.products.data != nullptr;
  // Blocks (0, 0), (1, 0), (1, 1).
  const int block = static_cast<int>(device::cta_z());
  const int first_row = block == 0 ? 0 : Shape::kBlock;
  const int first_column = block < 2 ? 0 : Shape::kBlock;

  const PagedKeys paged{p.key_cache, p.block_table, item.layer, item.row, item.head};
  const auto* data = static_cast<const C*>(p.key_cache.data);
  UnturnedKey<HEAD_SIZE> origin, sums, directions;
  load_origin<C>(p, paged, num_entries, &origin);
  sums.clear();
  directions.clear();
  Products<1, Shape::kBlock> products;
  products.clear();

  for (int64_t start = first; start < end; start += Shape::kKeys) {
    device::sync_cta();
    for (int i = thread; i < Shape::kKeys; i += Shape::kThreads) {
      shared.offsets[i] = start + i < end ? paged.offset(start + i) : -1;
    }
    device::sync_cta();
#pragma unroll 2
    for (int i = warp; i < Shape::kKeys; i += Shape::kWarps) {
      UnturnedKey<HEAD_SIZE> key;
      key.clear();
      if (shared.offsets[i] >= 0) {
        key.load(p.rotation, data + shared.offsets[i]);
        const float square = key.dot(key);
        directions.add(key, square > 0 ? 1.0f / sqrtf(square) : 0.0f);
        key.turn_back(p.rotation, start + i);
        key.add(origin, -1.0f);
        sums.add(key, 1.0f);
      }
      if (!with_products) continue;
      key.for_pairs(p.rotation, [&](int k, KeyPair pair) {
        shared.keys.set(i, pair.first, key.first[k]);
        shared.keys.set(i, pair.second, key.second[k]);
      });
    }
    if (!with_products) continue;
    device::sync_cta();
#pragma unroll
    for (int k = 0; k < Shape::kKeys; k += 16) {
      SplitFragment rows;
      shared.keys.load_left_columns(first_row + 16 * warp, k, &rows);
#pragma unroll
      for (int j = 0; j < Shape::kBlock / 16; ++j) {
        // What lies above the diagonal is a mirror image.
        if (first_row == first_column && j > warp) continue;
        SplitFragment columns;
        shared.keys.load_right_columns(first_column + 16 * j, k, &columns);
        multiply_add_split(products.values[0][2 * j], rows, columns, 0);
        multiply_add_split(products.values[0][2 * j + 1], rows, columns, 1);
      }
    }
  }

  MomentsPart<HEAD_SIZE>& part = parts[device::cta_y() * num_parts + device::cta_x()];
  if (with_products) {
#pragma unroll
    for (int j = 0; j < Shape::kBlock / 8; ++j) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int row = first_row + 16 * warp + lane / 4 + k / 2 * 8;
        const int column = first_column + 8 * j + 2 * (lane % 4) + k % 2;
        if (column <= row) part.products[row * HEAD_SIZE + column] = products.values[0][j][k];
      }
    }
  }
  if (block > 0) return;
  sums.store(p.rotation, shared.sums[warp]);
  directions.store(p.rotation, shared.directions[warp]);
  device::sync_cta();
  for (int d = thread; d < HEAD_SIZE; d += Shape::kThreads) {
    float sum = 0, direction = 0;
#pragma unroll
    for (int i = 0; i < Shape::kWarps; ++i) {
      sum += shared.sums[i][d];
      direction += shared.directions[i][d];
    }
    part.sums[d] = sum;
    part.directions[d] = direction;
  }
}

constexpr int kMomentsThreads = 256;
constexpr int kMomentsRows = 16;

template <int HEAD_SIZE>
struct MomentsSumShared {
  float origin[HEAD_SIZE];
  float offsets[HEAD_SIZE];
};

// CTA (x, item): rows x * kMomentsRows.. of the products of item first_item + y, centred; the first
// also has what is one for each dimension.
template <typename C, int HEAD_SIZE>
EMS_KERNEL(kMomentsThreads, 2)
key_moments_sum_kernel(KeyMomentsParams p, int64_t first_item, int64_t keys_per_part,
                       int64_t num_parts, const MomentsPart<HEAD_SIZE>* parts) {
  auto& shared = device::shared_memory<MomentsSumShared<HEAD_SIZE>>();
  const int thread = device::thread_index();
  const Item item = item_at(p, first_item + device::cta_y());
  const int64_t num_entries = p.num_entries[item.row];
  const int64_t num_own = (num_entries + keys_per_part - 1) / keys_per_part;
  const auto* own = parts + device::cta_y() * num_parts;
  const bool with_products = p.products.data != nullptr;

  if (thread < device::kWarpSize && with_products) {
    UnturnedKey<HEAD_SIZE> origin;
    origin.clear();
    if (num_entries > 0) {
      const PagedKeys paged{p.key_cache, p.block_table, item.layer, item.row, item.head};
      load_origin<C>(p, paged, num_entries, &origin);
    }
    origin.store(p.rotation, shared.origin);
  }
  device::sync_cta();
  for (int d = thread; d < HEAD_SIZE; d += kMomentsThreads) {
    float sum = 0, direction = 0;
    for (int64_t part = 0; part < num_own; ++part) {
      sum += own[part].sums[d];
      direction += own[part].directions[d];
    }
    shared.offsets[d] = num_entries > 0 ? sum / static_cast<float>(num_entries) : 0.0f;
    if (device::cta_x() > 0) continue;
    p.directions.at(item.layer, item.row, item.head)[d] = direction;
    if (!with_products) continue;
    p.means.at(item.layer, item.row, item.head)[d] = shared.origin[d] + shared.offsets[d];
  }
  if (!with_products) return;
  device::sync_cta();
  float* out = p.products.at(item.layer, item.row, item.head);
  for (int i = thread; i < kMomentsRows * HEAD_SIZE; i += kMomentsThreads) {
    const int row = static_cast<int>(device::cta_x()) * kMomentsRows + i / HEAD_SIZE;
    const int column = i % HEAD_SIZE;
    const int index = row > column ? row * HEAD_SIZE + column : column * HEAD_SIZE + row;
    float sum = 0;
    for (int64_t part = 0; part < num_own; ++part) sum += own[part].products[index];
    const float offset = shared.offsets[row] * shared.offsets[column];
    out[row * HEAD_SIZE + column] = sum - static_cast<float>(num_entries) * offset;
  }
}

}  // namespace ems
