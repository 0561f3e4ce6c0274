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
};

// Vectors as group_multiply reads them: pieces of 64 elements, each [NUM_ROWS][64] with swizzled
// chunks. The last piece may be filled in part; what is not filled is not read.
template <typename T, int HEAD_SIZE, int NUM_ROWS>
struct alignas(1024) SwizzledTile {
  static constexpr int kPieces = (HEAD_SIZE + 63) / 64;
  static constexpr int kChunks = HEAD_SIZE / 8;

  T elements[kPieces * NUM_ROWS * 64];

  // Starts copying row r from base + offsets[r], as Tile::gather does, for WARP_ROWS rows from
  // first_row on, a multiple of 8; by a warp.
  template <int WARP_ROWS>
  EMS_DEVICE void gather(const T* base, const int64_t* offsets, int first_row) {
    constexpr int kRest = kChunks % 8;
    gather_pieces<WARP_ROWS, 0, kChunks / 8, 8>(base, offsets, first_row);
    if constexpr (kRest > 0) {
      gather_pieces<WARP_ROWS, kChunks / 8, 1, kRest>(base, offsets, first_row);
    }
  }

 private:
  // CHUNKS chunks of each of some pieces: a lane copies one chunk of every row that it comes to, so
  // that of all addresses only the row's has to be computed.
  template <int WARP_ROWS, int FIRST_PIECE, int NUM_PIECES, int CHUNKS>
  EMS_DEVICE void gather_pieces(const T* base, const int64_t* offsets, int first_row) {
    constexpr int kRowsPerStep = device::kWarpSize / CHUNKS;
    constexpr int kSteps = WARP_ROWS / kRowsPerStep;
    static_assert(WARP_ROWS % kRowsPerStep == 0);
    const unsigned lane = static_cast<unsigned>(device::thread_index()) % device::kWarpSize;
    const unsigned chunk = lane % CHUNKS;
    int64_t row_offsets[kSteps];
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      row_offsets[k] = offsets[first_row + k * kRowsPerStep + lane / CHUNKS];
    }
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      const unsigned row = k * kRowsPerStep + lane / CHUNKS;
      const T* from = base + row_offsets[k] + FIRST_PIECE * 64 + chunk * 8;
      T* to = elements + (FIRST_PIECE * NUM_ROWS + first_row + row) * 64 + (chunk ^ row % 8) * 8;
#pragma unroll
      for (int piece = 0; piece < NUM_PIECES; ++piece) {
        device::copy_async(to + piece * NUM_ROWS * 64, from + piece * 64);
      }
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

// All threads: gathers the staying vectors, of type C, and prepares the barriers. Ends with a
// barrier.
template <typename T, int HEAD_SIZE, typename C>
EMS_DEVICE void start(SumShared<T, HEAD_SIZE>& shared, const C* staying_data) {
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

// The gathering group. LOOK_UP(index) tells what there is to know of streaming vector `index`; it
// is called one tile ahead, because it waits for memory. STORE(stage, row, looked up) puts it into
// shared memory. A warp gathers the rows that it has looked up, so that it waits for no other.
template <typename T, int HEAD_SIZE, typename LOOK_UP, typename STORE>
EMS_DEVICE void produce(SumShared<T, HEAD_SIZE>& shared, const T* streaming_data, int32_t num_tiles,
                        const LOOK_UP& look_up, const STORE& store) {
  using Shape = SumShape<HEAD_SIZE>;
  constexpr int kRows = Shape::kStreaming * device::kWarpSize / device::kGroupSize;
  const int lane = device::thread_index() % device::kWarpSize;
  const int first_row = device::thread_index() / device::kWarpSize * kRows;
  const int row = first_row + lane % kRows;
  Stage stage, previous;
  auto next = look_up(row);
  for (int32_t tile = 0; tile < num_tiles; ++tile) {
    const auto looked_up = next;
    next = look_up((tile + 1) * Shape::kStreaming + row);
    // Fresh barriers count as having completed the phase before their first.
    shared.empty[stage.index].wait(stage.parity ^ 1);
    if (lane < kRows) store(stage.index, row, looked_up);
    device::sync_warp();
    shared.streaming[stage.index].template gather<kRows>(
        streaming_data, shared.streaming_offsets[stage.index], first_row);
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

// A multiplying group: READ(tile, stage, products) uses the products of a tile, and may change
// them.
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
    const uint64_t columns = device::describe_columns(shared.streaming[stage.index].elements);
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      constexpr int kPieceBytes = kStreaming * 64 * sizeof(T);
      const int num_bytes = k / 4 * kPieceBytes + k % 4 * 16 * static_cast<int>(sizeof(T));
      device::group_multiply<T, kStreaming>(products.values[0], staying[k],
                                            device::advance_columns(columns, num_bytes), k > 0);
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
template <typename T, int HEAD_SIZE, typename C, typename QUERIES, typename OUT>
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
    shared.staying_offsets[i] = key < num_keys ? keys.offset(key) : 0;
  }
  device::sync_cta();
  start(shared, static_cast<const C*>(keys.cache.data));

  if (thread < device::kGroupSize) {
    produce(
        shared, query_data, num_tiles,
        [&](int32_t index) {
          return streaming_query(queries, first_tile * kStreaming + index, lse);
        },
        [&](int stage, int row, const StreamingQuery& query) {
          shared.streaming_offsets[stage][row] = query.offset;
          shared.visible[stage][row] = query.visible;
          shared.lse[stage][row] = query.lse * kLog2E;
        });
    return;
  }

  const int lane = thread % device::kWarpSize;
  const int warp = (thread - device::kGroupSize) / device::kWarpSize;
  const float scale_log2 = scale_to_log2(scale);
  const int32_t last_key =
      first_key + Shape::kStaying < num_keys ? first_key + Shape::kStaying : num_keys;
  const int32_t own_keys[2] = {first_key + warp * 16 + lane / 4,
                               first_key + warp * 16 + lane / 4 + 8};
  float mass[2] = {};
  consume(shared, num_tiles, [&](int32_t, int stage, Products<1, kStreaming>& products) {
    const int32_t ends[2] = {shared.visible[stage][0], shared.visible[stage][kStreaming - 1]};
    if (ends[0] < last_key || ends[1] < last_key) {
      products.hide([&](int, int half, int column) {
        return own_keys[half] >= shared.visible[stage][column];
      });
    }
#pragma unroll
    for (int j = 0; j < kStreaming / 8; ++j) {
      const int column = 8 * j + 2 * (lane % 4);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const float lse_log2 = shared.lse[stage][column + k % 2];
        mass[k / 2] += device::exp2_fast(products.values[0][j][k] * scale_log2 - lse_log2);
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

// As ems::compute_lse.
template <typename T, int HEAD_SIZE, typename QUERIES, typename OUT>
EMS_DEVICE void compute_lse(const QUERIES& queries, const T* query_data, const PagedKeys& keys,
                            int32_t first_query, int32_t first_key, int32_t end_key, float scale,
                            const OUT& out) {
  using Shape = SumShape<HEAD_SIZE>;
  constexpr int kStreaming = Shape::kStreaming;
  auto& shared = device::shared_memory<SumShared<T, HEAD_SIZE>, kSharedBytesSm90>();
  const int thread = device::thread_index();

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
  start(shared, query_data);

  if (thread < device::kGroupSize) {
    produce(
        shared, static_cast<const T*>(keys.cache.data), num_tiles,
        [&](int32_t index) {
          const int32_t key = first_key + index;
          return key < stop ? keys.offset(key) : 0;
        },
        [&](int stage, int row, int64_t offset) { shared.streaming_offsets[stage][row] = offset; });
    return;
  }

  const int lane = thread % device::kWarpSize;
  const int warp = (thread - device::kGroupSize) / device::kWarpSize;
  const int own_rows[2] = {warp * 16 + lane / 4, warp * 16 + lane / 4 + 8};
  const float scale_log2 = scale_to_log2(scale);
  int32_t seen[2];
  for (int half = 0; half < 2; ++half) {
    const int32_t visible = shared.staying_visible[own_rows[half]];
    seen[half] = visible < stop ? visible : stop;
  }
  LaneSoftmax softmax[2];
  consume(shared, num_tiles, [&](int32_t tile, int, Products<1, kStreaming>& products) {
    const int32_t tile_key = first_key + tile * kStreaming;
    if (min_visible < tile_key + kStreaming || stop < tile_key + kStreaming) {
      products.hide([&](int, int half, int column) { return tile_key + column >= seen[half]; });
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      softmax[half].update(products.values[0], half, scale_log2);
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
