// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cmath>
#include <cstdint>

#include "ems/device.cuh"
#include "ems/lane_softmax.cuh"
#include "ems/paged_kv.h"
#include "ems/tile.cuh"

// Attention of many queries to the keys of one kv_head without its matrix: the log of each query's
// softmax denominator, and the attention that each key receives in sum. score_queries.cuh and
// score_window.cuh say which queries there are; here a "query" is a vector of one query head, and
// "visible" counts the leading keys that it sees.
//
// T is the type of the queries and of the arithmetic, C that of the keys in the cache: T, or
// float8.
//
// A QUERIES type gives, for one kv_head of one row:
//     int32_t size()                       queries, of which the first and last may not exist
//     Query at(int32_t)                    one of them; visible is ascending or descending
//     int32_t first_seeing(int32_t key)    a query before which none sees the key
namespace ems {

struct Query {
  int64_t offset;     // of its vector, in elements; not used when there is no such query
  int32_t visible;    // keys it sees; 0 when there is no such query
  int64_t lse_index;  // of its log-sum-exp
};

// How a CTA divides a product: kStaying vectors stay, kStreaming at a time stream past. Larger
// vectors get fewer rows per warp, because the staying ones are held in registers, and fewer at a
// time, because shared memory is limited; so is float32, which runs on the ordinary cores.
template <typename T, int HEAD_SIZE>
struct SumShape {
  static constexpr bool kIsFloat = sizeof(T) == 4;
  static constexpr int kStayingTiles = kIsFloat || HEAD_SIZE > 128 ? 1 : 2;
  static constexpr int kWarps = 4;
  static constexpr int kThreads = kWarps * device::kWarpSize;
  static constexpr int kStaying = 16 * kStayingTiles * kWarps;
  static constexpr int kFloatStreaming = HEAD_SIZE > 128 ? 8 : 32;
  static constexpr int kHalfStreaming = HEAD_SIZE > 128 ? 32 : 64;
  static constexpr int kStreaming = kIsFloat ? kFloatStreaming : kHalfStreaming;
  // Registers for two CTAs at a time, at least.
  static constexpr int kMinCtas = 2;
};

// Attention that a key receives. Of a lane at first, which sees some of the queries.
struct Received {
  float sum = 0;

  EMS_DEVICE void add(float even, float odd) { sum += even + odd; }

  // Of the four lanes that share a key.
  EMS_DEVICE Received of_quad() const {
    Received all = *this;
    all.sum += device::shuffle_xor(all.sum, 1);
    all.sum += device::shuffle_xor(all.sum, 2);
    return all;
  }
};

// The same, and the most from a single query.
struct ReceivedAndPeak {
  float sum = 0;
  float peak = 0;

  EMS_DEVICE void add(float even, float odd) {
    sum += even + odd;
    peak = fmaxf(peak, fmaxf(even, odd));
  }

  EMS_DEVICE ReceivedAndPeak of_quad() const {
    ReceivedAndPeak all = *this;
    for (int lanes = 1; lanes <= 2; lanes *= 2) {
      all.sum += device::shuffle_xor(all.sum, lanes);
      all.peak = fmaxf(all.peak, device::shuffle_xor(all.peak, lanes));
    }
    return all;
  }
};

// Keys of one kv_head of one row.
struct PagedKeys {
  PagedTensor cache;
  BlockTable table;
  int64_t layer;
  int64_t row;
  int64_t head;

  // Divides in 32 bits: the loops ask for an entry per row of a tile.
  EMS_DEVICE int64_t offset(int32_t entry) const {
    const auto block_size = static_cast<uint32_t>(cache.block_size);
    const uint32_t column = static_cast<uint32_t>(entry) / block_size;
    const int64_t slot = static_cast<uint32_t>(entry) - column * block_size;
    return layer * cache.layer_stride + table.at(row, column) * cache.block_stride +
           head * cache.head_stride + slot * cache.slot_stride;
  }
};

// What is looked up of a query that streams past.
struct StreamingQuery {
  int64_t offset;
  int32_t visible;
  float lse;
};

// Of query `index`; one that does not exist sees no key, whatever vector stands for it. The lse is
// as it was given, since the first use of a value that is loaded waits for it.
template <typename QUERIES>
EMS_DEVICE StreamingQuery streaming_query(const QUERIES& queries, int32_t index, const float* lse) {
  if (index < queries.size()) {
    const Query query = queries.at(index);
    if (query.visible > 0) return {query.offset, query.visible, lse[query.lse_index]};
  }
  return {0, 0, INFINITY};
}

// Two tiles: one is multiplied while the next arrives. What is known of a tile's vectors is
// prepared one tile earlier still, hence three.
template <typename T, int HEAD_SIZE, int NUM_STAYING, int NUM_STREAMING>
struct SumShared {
  Tile<T, HEAD_SIZE, NUM_STAYING> staying;
  Tile<T, HEAD_SIZE, NUM_STREAMING> streaming[2];
  int64_t staying_offsets[NUM_STAYING];
  int64_t streaming_offsets[3][NUM_STREAMING];
  int32_t visible[3][NUM_STREAMING];  // of streaming queries
  float lse[3][NUM_STREAMING];        // of streaming queries, in units of log 2
  int32_t staying_visible[NUM_STAYING];
  int32_t bounds[2];
};

// The staying vectors are keys first..first+kStaying-1; out(key, received) takes what each
// receives, a RECEIVED.
template <typename T, int HEAD_SIZE, typename C, typename RECEIVED, typename QUERIES, typename OUT>
EMS_DEVICE void add_attention(const QUERIES& queries, const T* query_data, const PagedKeys& keys,
                              int32_t first_key, int32_t num_keys, float scale, const float* lse,
                              const OUT& out) {
  using Shape = SumShape<T, HEAD_SIZE>;
  constexpr int kStreaming = Shape::kStreaming;
  auto& shared =
      device::shared_memory<SumShared<T, HEAD_SIZE, Shape::kStaying, Shape::kStreaming>>();
  const int thread = device::thread_index();
  const int lane = thread % device::kWarpSize;
  const int warp = thread / device::kWarpSize;
  const float scale_log2 = scale_to_log2(scale);
  const int32_t last_key =
      first_key + Shape::kStaying < num_keys ? first_key + Shape::kStaying : num_keys;

  const int32_t start = queries.first_seeing(first_key) / kStreaming;
  const int32_t end = (queries.size() + kStreaming - 1) / kStreaming;

  static_assert(kStreaming <= Shape::kThreads);
  const auto look_up = [&](int32_t tile) -> StreamingQuery {
    if (thread >= kStreaming) return {};
    return streaming_query(queries, tile * kStreaming + thread, lse);
  };
  const auto store = [&](int32_t tile, const StreamingQuery& query) {
    if (thread >= kStreaming) return;
    shared.streaming_offsets[tile % 3][thread] = query.offset;
    shared.visible[tile % 3][thread] = query.visible;
    shared.lse[tile % 3][thread] = query.lse * kLog2E;
  };
  const auto fetch = [&](int32_t tile) {
    shared.streaming[tile % 2].template gather<Shape::kThreads>(query_data,
                                                                shared.streaming_offsets[tile % 3]);
    device::commit_copies();
  };

  if (start < end) {
    for (int i = thread; i < Shape::kStaying; i += Shape::kThreads) {
      const int32_t key = first_key + i;
      shared.staying_offsets[i] = key < num_keys ? keys.offset(key) : 0;
    }
    store(start, look_up(start));
    store(start + 1, look_up(start + 1));
    device::sync_cta();
    shared.staying.template gather<Shape::kThreads>(static_cast<const C*>(keys.cache.data),
                                                    shared.staying_offsets);
    fetch(start);
  }

  RECEIVED received[Shape::kStayingTiles][2] = {};
  LeftRows<T, HEAD_SIZE, Shape::kStayingTiles> staying;
  Products<Shape::kStayingTiles, kStreaming> products;
  for (int32_t tile = start; tile < end; ++tile) {
    device::wait_for_copies<0>();
    // The tile is here for all, and nobody still reads what is overwritten next.
    device::sync_cta();
    if (tile + 1 < end) fetch(tile + 1);
    const StreamingQuery looked_up = look_up(tile + 2);
    if (tile == start) staying.load(shared.staying, warp * 16 * Shape::kStayingTiles);
    staying.multiply(shared.streaming[tile % 2], &products);
    // Not before the products, which it would wait in front of.
    store(tile + 2, looked_up);

    const int slot = tile % 3;
    // Queries come in order of what they see; a tile whose least sees all keys needs no mask.
    const int32_t ends[2] = {shared.visible[slot][0], shared.visible[slot][kStreaming - 1]};
    if (ends[0] < last_key || ends[1] < last_key) {
      products.hide([&](int i, int half, int column) {
        const int32_t key =
            first_key + (warp * Shape::kStayingTiles + i) * 16 + 8 * half + lane / 4;
        return key >= shared.visible[slot][column];
      });
    }
#pragma unroll
    for (int j = 0; j < kStreaming / 8; ++j) {
      const int column = 8 * j + 2 * (lane % 4);
      const float lse_even = shared.lse[slot][column];
      const float lse_odd = shared.lse[slot][column + 1];
#pragma unroll
      for (int i = 0; i < Shape::kStayingTiles; ++i) {
        const float* values = products.values[i][j];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          received[i][half].add(device::exp2_fast(values[2 * half] * scale_log2 - lse_even),
                                device::exp2_fast(values[2 * half + 1] * scale_log2 - lse_odd));
        }
      }
    }
  }

#pragma unroll
  for (int i = 0; i < Shape::kStayingTiles; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const RECEIVED all = received[i][half].of_quad();
      const int32_t key = first_key + (warp * Shape::kStayingTiles + i) * 16 + 8 * half + lane / 4;
      if (lane % 4 == 0 && key < num_keys) out(key, all);
    }
  }
}

// The staying vectors are queries first..first+kStaying-1, against keys first_key..end_key-1;
// out(lse_index, lse) takes the log-sum-exp of each over these keys, -inf when it sees none.
template <typename T, int HEAD_SIZE, typename C, typename QUERIES, typename OUT>
EMS_DEVICE void compute_lse(const QUERIES& queries, const T* query_data, const PagedKeys& keys,
                            int32_t first_query, int32_t first_key, int32_t end_key, float scale,
                            const OUT& out) {
  using Shape = SumShape<T, HEAD_SIZE>;
  constexpr int kStreaming = Shape::kStreaming;
  auto& shared =
      device::shared_memory<SumShared<T, HEAD_SIZE, Shape::kStaying, Shape::kStreaming>>();
  const int thread = device::thread_index();
  const int lane = thread % device::kWarpSize;
  const int warp = thread / device::kWarpSize;
  const float scale_log2 = scale_to_log2(scale);

  if (thread < 2) shared.bounds[thread] = thread == 0 ? 0x7fffffff : 0;
  device::sync_cta();
  for (int i = thread; i < Shape::kStaying; i += Shape::kThreads) {
    const int32_t index = first_query + i;
    const Query query = index < queries.size() ? queries.at(index) : Query{0, 0, 0};
    shared.staying_offsets[i] = query.visible > 0 ? query.offset : 0;
    shared.staying_visible[i] = query.visible;
    if (query.visible > 0) {
      device::min_shared(&shared.bounds[0], query.visible);
      device::max_shared(&shared.bounds[1], query.visible);
    }
  }
  device::sync_cta();
  const int32_t min_visible = shared.bounds[0];
  const int32_t stop = shared.bounds[1] < end_key ? shared.bounds[1] : end_key;

  const int32_t num_tiles = stop > first_key ? (stop - first_key + kStreaming - 1) / kStreaming : 0;
  static_assert(kStreaming <= Shape::kThreads);
  const auto look_up = [&](int32_t tile) -> int64_t {
    const int32_t key = first_key + tile * kStreaming + thread;
    return thread < kStreaming && key < stop ? keys.offset(key) : 0;
  };
  const auto store = [&](int32_t tile, int64_t offset) {
    if (thread < kStreaming) shared.streaming_offsets[tile % 3][thread] = offset;
  };
  const auto fetch = [&](int32_t tile) {
    shared.streaming[tile % 2].template gather<Shape::kThreads>(
        static_cast<const C*>(keys.cache.data), shared.streaming_offsets[tile % 3]);
    device::commit_copies();
  };
  if (num_tiles > 0) {
    store(0, look_up(0));
    store(1, look_up(1));
    device::sync_cta();
    shared.staying.template gather<Shape::kThreads>(query_data, shared.staying_offsets);
    fetch(0);
  }

  LaneSoftmax softmax[Shape::kStayingTiles][2];
  // The keys before this one are seen by the rows of this lane.
  int32_t seen[Shape::kStayingTiles][2];
#pragma unroll
  for (int i = 0; i < Shape::kStayingTiles; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int32_t visible =
          shared.staying_visible[(warp * Shape::kStayingTiles + i) * 16 + 8 * half + lane / 4];
      seen[i][half] = visible < stop ? visible : stop;
    }
  }
  LeftRows<T, HEAD_SIZE, Shape::kStayingTiles> staying;
  Products<Shape::kStayingTiles, kStreaming> products;
  for (int32_t tile = 0; tile < num_tiles; ++tile) {
    device::wait_for_copies<0>();
    device::sync_cta();
    if (tile + 1 < num_tiles) fetch(tile + 1);
    const int64_t looked_up = look_up(tile + 2);
    if (tile == 0) staying.load(shared.staying, warp * 16 * Shape::kStayingTiles);
    staying.multiply(shared.streaming[tile % 2], &products);
    store(tile + 2, looked_up);

    const int32_t tile_key = first_key + tile * kStreaming;
    if (min_visible < tile_key + kStreaming || stop < tile_key + kStreaming) {
      products.hide(
          [&](int i, int half, int column) { return tile_key + column >= seen[i][half]; });
    }
#pragma unroll
    for (int i = 0; i < Shape::kStayingTiles; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        softmax[i][half].update(products.values[i], half, scale_log2);
      }
    }
  }

#pragma unroll
  for (int i = 0; i < Shape::kStayingTiles; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float value = softmax[i][half].lse_of_quad();
      const int32_t index =
          first_query + (warp * Shape::kStayingTiles + i) * 16 + 8 * half + lane / 4;
      if (lane % 4 == 0 && index < queries.size()) {
        const Query query = queries.at(index);
        if (query.visible > 0) out(query.lse_index, value);
      }
    }
  }
}

}  // namespace ems
