// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cmath>
#include <cstdint>

#include "ems/attention_sums.cuh"
#include "ems/device_sm90.cuh"

// attention_sums.cuh for compute capability 9.0a. One group of warps gathers the streaming vectors;
// two others multiply, each the 64 staying vectors that it holds in registers. A multiplying group
// waits for its product and then takes the exponentials, so the tensor cores are busy meanwhile
// only where the other group is at another point of its tile; nothing makes it be.
namespace ems::sm90 {

template <int HEAD_SIZE>
struct SumShape {
  static constexpr int kGroups = 2;
  static constexpr int kThreads = (kGroups + 1) * device::kGroupSize;
  static constexpr int kStaying = 64 * kGroups;
  static constexpr int kStreaming = HEAD_SIZE > 128 ? 64 : 128;
  // The two groups may be a tile apart, and one is on its way.
  static constexpr int kStages = 3;
  // Of 64K registers; three equal groups would have 168 each.
  static constexpr int kProducerRegisters = 88;
  static constexpr int kConsumerRegisters = 208;
};

// Vectors as group_multiply reads them: pieces of 64 elements, each [NUM_ROWS][64] with swizzled
// chunks. The last piece may be filled in part; what is not filled is not read.
template <typename T, int HEAD_SIZE, int NUM_ROWS>
struct alignas(1024) SwizzledTile {
  static constexpr int kPieces = (HEAD_SIZE + 63) / 64;
  static constexpr int kChunks = HEAD_SIZE / 8;

  T elements[kPieces * NUM_ROWS * 64];

  template <int NUM_THREADS>
  EMS_DEVICE void gather(const T* base, const int64_t* offsets, int thread) {
#pragma unroll 4
    for (int i = thread; i < NUM_ROWS * kChunks; i += NUM_THREADS) {
      const int row = i / kChunks;
      const int chunk = i % kChunks;
      const int64_t offset = offsets[row];
      T* to = elements + (chunk / 8 * NUM_ROWS + row) * 64 + ((chunk % 8) ^ (row % 8)) * 8;
      device::copy_async(to, base + (offset < 0 ? 0 : offset + chunk * 8), offset >= 0);
    }
  }
};

template <typename T, int HEAD_SIZE>
struct SumShared {
  using Shape = SumShape<HEAD_SIZE>;
  SwizzledTile<T, HEAD_SIZE, Shape::kStreaming> streaming[Shape::kStages];
  Tile<T, HEAD_SIZE, Shape::kStaying> staying;
  int64_t staying_offsets[Shape::kStaying];
  int64_t streaming_offsets[Shape::kStages][Shape::kStreaming];
  int32_t visible[Shape::kStages][Shape::kStreaming];  // of streaming queries
  float lse[Shape::kStages][Shape::kStreaming];        // of streaming queries, in units of log 2
  int32_t staying_visible[Shape::kStaying];
  int32_t bounds[2];
  device::Barrier full[Shape::kStages];
  device::Barrier empty[Shape::kStages];
};

// Position in the ring of stages.
struct Stage {
  int index = 0;
  int parity = 0;

  template <int NUM_STAGES>
  EMS_DEVICE void advance() {
    if (++index == NUM_STAGES) {
      index = 0;
      parity ^= 1;
    }
  }
};

// All threads: gathers the staying vectors and prepares the barriers. Ends with a barrier.
template <typename T, int HEAD_SIZE>
EMS_DEVICE void start(SumShared<T, HEAD_SIZE>& shared, const T* staying_data) {
  using Shape = SumShape<HEAD_SIZE>;
  if (device::thread_index() == 0) {
    for (int i = 0; i < Shape::kStages; ++i) {
      shared.full[i].init(device::kGroupSize);
      shared.empty[i].init(Shape::kGroups * device::kGroupSize);
    }
  }
  device::publish_to_groups();
  shared.staying.template gather<Shape::kThreads>(staying_data, shared.staying_offsets);
  device::commit_copies();
  device::wait_for_copies<0>();
  device::sync_cta();
}

// The gathering group: PREPARE(tile) -> VECTOR of this thread, computed one tile ahead because it
// waits for memory; STORE(stage, vector) puts it into shared memory.
template <typename T, int HEAD_SIZE, typename PREPARE, typename STORE>
EMS_DEVICE void produce(SumShared<T, HEAD_SIZE>& shared, const T* streaming_data, int32_t num_tiles,
                        const PREPARE& prepare, const STORE& store) {
  using Shape = SumShape<HEAD_SIZE>;
  constexpr int kBarrierId = 1;
  const int thread = device::thread_index() % device::kGroupSize;
  Stage stage, previous;
  auto next = prepare(0);
  for (int32_t tile = 0; tile < num_tiles; ++tile) {
    const auto vector = next;
    if (tile + 1 < num_tiles) next = prepare(tile + 1);
    // Fresh barriers count as having completed the phase before their first.
    shared.empty[stage.index].wait(stage.parity ^ 1);
    store(stage.index, vector);
    device::sync_some(kBarrierId, device::kGroupSize);
    shared.streaming[stage.index].template gather<device::kGroupSize>(
        streaming_data, shared.streaming_offsets[stage.index], thread);
    device::commit_copies();
    if (tile > 0) {
      device::wait_for_copies<1>();
      device::publish_to_groups();
      shared.full[previous.index].arrive();
    }
    previous = stage;
    stage.template advance<Shape::kStages>();
  }
  if (num_tiles > 0) {
    device::wait_for_copies<0>();
    device::publish_to_groups();
    shared.full[previous.index].arrive();
  }
}

// A multiplying group: READ(tile, stage, products) uses the products of a tile.
template <typename T, int HEAD_SIZE, typename READ>
EMS_DEVICE void consume(SumShared<T, HEAD_SIZE>& shared, int32_t num_tiles, const READ& read) {
  using Shape = SumShape<HEAD_SIZE>;
  constexpr int kStreaming = Shape::kStreaming;
  constexpr int kSteps = HEAD_SIZE / 16;
  const int warp =
      device::thread_index() / device::kWarpSize - device::kGroupSize / device::kWarpSize;
  const int lane = device::thread_index() % device::kWarpSize;
  uint32_t staying[kSteps][4];
  const T* row = shared.staying.row(warp * 16 + lane % 16) + lane / 16 * 8;
#pragma unroll
  for (int k = 0; k < kSteps; ++k) device::load_matrices(staying[k], row + 16 * k);

  Stage stage;
  Products<1, kStreaming> products;
  for (int32_t tile = 0; tile < num_tiles; ++tile) {
    shared.full[stage.index].wait(stage.parity);
    device::pin(products.values[0]);
    device::begin_group_products();
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      const uint64_t columns = device::describe_columns(
          shared.streaming[stage.index].elements + k / 4 * kStreaming * 64, k % 4 * 16);
      device::group_multiply<T, kStreaming>(products.values[0], staying[k], columns, k > 0);
    }
    device::commit_group_products();
    device::wait_for_group_products<0>();
    device::pin(products.values[0]);
    read(tile, stage.index, products);
    shared.empty[stage.index].arrive();
    stage.template advance<Shape::kStages>();
  }
}

// As ems::add_attention.
template <typename T, int HEAD_SIZE, typename QUERIES, typename OUT>
EMS_DEVICE void add_attention(const QUERIES& queries, const T* query_data, const PagedKeys& keys,
                              int32_t first_key, int32_t num_keys, float scale, const float* lse,
                              const OUT& out) {
  using Shape = SumShape<HEAD_SIZE>;
  constexpr int kStreaming = Shape::kStreaming;
  auto& shared = device::shared_memory<SumShared<T, HEAD_SIZE>, kSharedBytesSm90>();
  const int thread = device::thread_index();
  const int32_t first_tile = queries.first_seeing(first_key) / kStreaming;
  const int32_t end_tile = (queries.size() + kStreaming - 1) / kStreaming;
  const int32_t num_tiles = end_tile > first_tile ? end_tile - first_tile : 0;

  for (int i = thread; i < Shape::kStaying; i += Shape::kThreads) {
    const int32_t key = first_key + i;
    shared.staying_offsets[i] = key < num_keys ? keys.offset(key) : -1;
  }
  device::sync_cta();
  start(shared, static_cast<const T*>(keys.cache.data));

  if (thread < device::kGroupSize) {
    device::give_registers<Shape::kProducerRegisters>();
    struct Prepared {
      int64_t offset;
      int32_t visible;
      float lse;
    };
    produce(
        shared, query_data, num_tiles,
        [&](int32_t tile) -> Prepared {
          const int32_t index = (first_tile + tile) * kStreaming + thread;
          if (thread >= kStreaming || index >= queries.size()) return {-1, 0, INFINITY};
          const Query query = queries.at(index);
          if (query.visible == 0) return {-1, 0, INFINITY};
          return {query.offset, query.visible, lse[query.lse_index] * kLog2E};
        },
        [&](int stage, const Prepared& vector) {
          if (thread >= kStreaming) return;
          shared.streaming_offsets[stage][thread] = vector.offset;
          shared.visible[stage][thread] = vector.visible;
          shared.lse[stage][thread] = vector.lse;
        });
    return;
  }

  device::take_registers<Shape::kConsumerRegisters>();
  const int lane = thread % device::kWarpSize;
  const int warp = (thread - device::kGroupSize) / device::kWarpSize;
  const float scale_log2 = scale * kLog2E;
  const int32_t last_key =
      first_key + Shape::kStaying < num_keys ? first_key + Shape::kStaying : num_keys;
  const int32_t own_keys[2] = {first_key + warp * 16 + lane / 4,
                               first_key + warp * 16 + lane / 4 + 8};
  float mass[2] = {};
  consume(shared, num_tiles, [&](int32_t, int stage, const Products<1, kStreaming>& products) {
    const int32_t ends[2] = {shared.visible[stage][0], shared.visible[stage][kStreaming - 1]};
    const bool is_masked = ends[0] < last_key || ends[1] < last_key;
#pragma unroll
    for (int j = 0; j < kStreaming / 8; ++j) {
      const int column = 8 * j + 2 * (lane % 4);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const float lse_log2 = shared.lse[stage][column + k % 2];
        float attention = device::exp2_fast(products.values[0][j][k] * scale_log2 - lse_log2);
        if (is_masked && own_keys[k / 2] >= shared.visible[stage][column + k % 2]) attention = 0;
        mass[k / 2] += attention;
      }
    }
  });
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float sum = mass[half];
    sum += device::shuffle_xor(sum, 1);
    sum += device::shuffle_xor(sum, 2);
    if (lane % 4 == 0 && own_keys[half] < num_keys) out(own_keys[half], sum);
  }
}

// As ems::compute_lse, over all keys that the queries see.
template <typename T, int HEAD_SIZE, typename QUERIES, typename OUT>
EMS_DEVICE void compute_lse(const QUERIES& queries, const T* query_data, const PagedKeys& keys,
                            int32_t first_query, float scale, const OUT& out) {
  using Shape = SumShape<HEAD_SIZE>;
  constexpr int kStreaming = Shape::kStreaming;
  auto& shared = device::shared_memory<SumShared<T, HEAD_SIZE>, kSharedBytesSm90>();
  const int thread = device::thread_index();

  if (thread < 2) shared.bounds[thread] = thread == 0 ? 0x7fffffff : 0;
  device::sync_cta();
  for (int i = thread; i < Shape::kStaying; i += Shape::kThreads) {
    const int32_t index = first_query + i;
    const Query query = index < queries.size() ? queries.at(index) : Query{-1, 0, 0};
    shared.staying_offsets[i] = query.offset;
    shared.staying_visible[i] = query.visible;
    if (query.visible > 0) {
      device::min_shared(&shared.bounds[0], query.visible);
      device::max_shared(&shared.bounds[1], query.visible);
    }
  }
  device::sync_cta();
  const int32_t min_visible = shared.bounds[0];
  const int32_t stop = shared.bounds[1];
  const int32_t num_tiles = (stop + kStreaming - 1) / kStreaming;
  start(shared, query_data);

  if (thread < device::kGroupSize) {
    device::give_registers<Shape::kProducerRegisters>();
    produce(
        shared, static_cast<const T*>(keys.cache.data), num_tiles,
        [&](int32_t tile) -> int64_t {
          const int32_t key = tile * kStreaming + thread;
          return thread < kStreaming && key < stop ? keys.offset(key) : -1;
        },
        [&](int stage, int64_t offset) {
          if (thread < kStreaming) shared.streaming_offsets[stage][thread] = offset;
        });
    return;
  }

  device::take_registers<Shape::kConsumerRegisters>();
  const int lane = thread % device::kWarpSize;
  const int warp = (thread - device::kGroupSize) / device::kWarpSize;
  const int own_rows[2] = {warp * 16 + lane / 4, warp * 16 + lane / 4 + 8};
  const float scale_log2 = scale * kLog2E;
  LaneSoftmax softmax[2];
  consume(shared, num_tiles, [&](int32_t tile, int, const Products<1, kStreaming>& products) {
    const int32_t tile_key = tile * kStreaming;
    const bool is_masked = min_visible < tile_key + kStreaming;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int32_t num_seen = shared.staying_visible[own_rows[half]] - tile_key;
      // In parts, because all logits at once do not fit the registers beside the products.
      constexpr int kPart = 8;
#pragma unroll
      for (int start = 0; start < kStreaming / 4; start += kPart) {
        float logits[kPart];
#pragma unroll
        for (int i = 0; i < kPart; ++i) {
          const int j = start + i;
          logits[i] = products.values[0][j / 2][2 * half + j % 2] * scale_log2;
          const int column = j / 2 * 8 + 2 * (lane % 4) + j % 2;
          if (is_masked && column >= num_seen) logits[i] = -INFINITY;
        }
        softmax[half].update(logits);
      }
    }
  });
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float value = softmax[half].lse_of_quad();
    const int32_t index = first_query + own_rows[half];
    if (lane % 4 == 0 && index < queries.size()) {
      const Query query = queries.at(index);
      if (query.visible > 0) out(query.lse_index, value);
    }
  }
}

}  // namespace ems::sm90
