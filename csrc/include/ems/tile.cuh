// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cmath>
#include <cstdint>

#include "ems/device.cuh"
#include "ems/vector.h"

// Tiles of vectors in shared memory and their products, the common core of the kernels that compare
// vectors with vectors.
namespace ems {

// Vectors of HEAD_SIZE elements, one per row. 16 bytes of padding put equal chunks of eight
// neighbouring rows into different banks, which is what loading matrices reads at a time; it does
// so for every supported head size, where a swizzle would need powers of two.
template <typename T, int HEAD_SIZE, int NUM_ROWS>
struct alignas(16) Tile {
  static constexpr int kElementsPerChunk = 16 / static_cast<int>(sizeof(T));
  static constexpr int kChunks = HEAD_SIZE / kElementsPerChunk;
  static constexpr int kStride = HEAD_SIZE + kElementsPerChunk;

  T elements[NUM_ROWS * kStride];

  EMS_DEVICE const T* row(int row) const { return elements + row * kStride; }

  // Starts copying row r from base + offsets[r]. Rows stay apart in products, so a row that does
  // not exist may be a copy of any, whose products are not used. By all NUM_THREADS threads of the
  // CTA; consecutive ones copy consecutive chunks. Offsets are read before the first copy, because
  // the compiler moves no load across one and they would be waited for in turns.
  template <int NUM_THREADS>
  EMS_DEVICE void gather(const T* base, const int64_t* offsets) {
    constexpr unsigned kCopies = NUM_ROWS * kChunks;
    constexpr unsigned kPerThread = (kCopies + NUM_THREADS - 1) / NUM_THREADS;
    const auto thread = static_cast<unsigned>(device::thread_index());
    int64_t row_offsets[kPerThread];
#pragma unroll
    for (unsigned k = 0; k < kPerThread; ++k) {
      const unsigned i = k * NUM_THREADS + thread;
      row_offsets[k] = i < kCopies ? offsets[i / kChunks] : 0;
    }
#pragma unroll
    for (unsigned k = 0; k < kPerThread; ++k) {
      const unsigned i = k * NUM_THREADS + thread;
      const unsigned element = i % kChunks * kElementsPerChunk;
      if (i < kCopies) {
        device::copy_async(elements + i / kChunks * kStride + element,
                           base + row_offsets[k] + element);
      }
    }
  }

  // The same from rows of float8, which become T. What is copied in the background cannot be
  // converted on the way, so this one is done when it returns: a thread requests all that it
  // copies, waits once, converts and stores. Callers need nothing else for it, since the barrier
  // after which background copies may be read is one for stores as well. Keeping the loads in
  // registers until the current tile has been multiplied would hide that wait, at the price of
  // registers that the products use; half as many bytes arrive as for T, and other CTAs run.
  template <int NUM_THREADS>
  EMS_DEVICE void gather(const Float8E4M3* base, const int64_t* offsets) {
    constexpr unsigned kPerRow = HEAD_SIZE / 16;
    constexpr unsigned kLoads = NUM_ROWS * kPerRow;
    constexpr unsigned kPerThread = (kLoads + NUM_THREADS - 1) / NUM_THREADS;
    const auto thread = static_cast<unsigned>(device::thread_index());
    Vector16 packed[kPerThread];
#pragma unroll
    for (unsigned k = 0; k < kPerThread; ++k) {
      const unsigned i = k * NUM_THREADS + thread;
      if (i >= kLoads) continue;
      packed[k] =
          *reinterpret_cast<const Vector16*>(base + offsets[i / kPerRow] + i % kPerRow * 16);
    }
#pragma unroll
    for (unsigned k = 0; k < kPerThread; ++k) {
      const unsigned i = k * NUM_THREADS + thread;
      if (i >= kLoads) continue;
      Vector16 wide[2];
      device::widen_vector<T>(packed[k], wide);
      auto* out = reinterpret_cast<Vector16*>(elements + i / kPerRow * kStride + i % kPerRow * 16);
      out[0] = wide[0];
      out[1] = wide[1];
    }
  }
};

// Products of the rows of one warp with the rows of a tile, as tensor cores leave them: lane l
// holds, for every 16 left rows i and 8 right rows j, at [i / 16][j / 8]
//     {(a, b), (a, b + 1), (a + 8, b), (a + 8, b + 1)}  with  a = l / 4, b = 2 * (l % 4).
template <int LEFT_TILES, int NUM_RIGHT>
struct Products {
  float values[LEFT_TILES][NUM_RIGHT / 8][4];

  EMS_DEVICE void clear() {
#pragma unroll
    for (int i = 0; i < LEFT_TILES; ++i) {
#pragma unroll
      for (int j = 0; j < NUM_RIGHT / 8; ++j) {
#pragma unroll
        for (int k = 0; k < 4; ++k) values[i][j][k] = 0.0f;
      }
    }
  }

  // Makes -inf of the products for which is_hidden(i, half, right row) holds, whatever they are; of
  // left row 16 * i + 8 * half + l / 4.
  template <typename F>
  EMS_DEVICE void hide(const F& is_hidden) {
    const int lane = device::thread_index() % device::kWarpSize;
#pragma unroll
    for (int i = 0; i < LEFT_TILES; ++i) {
#pragma unroll
      for (int j = 0; j < NUM_RIGHT / 8; ++j) {
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          if (is_hidden(i, k / 2, 8 * j + 2 * (lane % 4) + k % 2)) values[i][j][k] = -INFINITY;
        }
      }
    }
  }
};

// The 16 * LEFT_TILES rows of a warp, kept in registers over many products.
template <typename T, int HEAD_SIZE, int LEFT_TILES>
class LeftRows {
 public:
  template <int NUM_ROWS>
  EMS_DEVICE void load(const Tile<T, HEAD_SIZE, NUM_ROWS>& tile, int first_row) {
    const int lane = device::thread_index() % device::kWarpSize;
#pragma unroll
    for (int i = 0; i < LEFT_TILES; ++i) {
      const T* row = tile.row(first_row + 16 * i + lane % 16) + lane / 16 * 8;
#pragma unroll
      for (int k = 0; k < HEAD_SIZE / 16; ++k)
        device::load_matrices(fragments_[i][k], row + 16 * k);
    }
  }

  template <int NUM_RIGHT>
  EMS_DEVICE void multiply(const Tile<T, HEAD_SIZE, NUM_RIGHT>& right,
                           Products<LEFT_TILES, NUM_RIGHT>* out) const {
    const int lane = device::thread_index() % device::kWarpSize;
    const T* base = right.row(lane % 8 + lane / 16 * 8) + lane / 8 % 2 * 8;
    out->clear();
#pragma unroll
    for (int k = 0; k < HEAD_SIZE / 16; ++k) {
#pragma unroll
      for (int j = 0; j < NUM_RIGHT / 16; ++j) {
        uint32_t b[4];
        device::load_matrices(b, base + 16 * j * right.kStride + 16 * k);
#pragma unroll
        for (int i = 0; i < LEFT_TILES; ++i) {
          device::multiply_add<T>(out->values[i][2 * j], fragments_[i][k], b[0], b[1]);
          device::multiply_add<T>(out->values[i][2 * j + 1], fragments_[i][k], b[2], b[3]);
        }
      }
    }
  }

 private:
  uint32_t fragments_[LEFT_TILES][HEAD_SIZE / 16][4];
};

// float32 has no exact tensor-core product: plain arithmetic, in the same layout.
template <int HEAD_SIZE, int LEFT_TILES>
class LeftRows<float, HEAD_SIZE, LEFT_TILES> {
 public:
  template <int NUM_ROWS>
  EMS_DEVICE void load(const Tile<float, HEAD_SIZE, NUM_ROWS>& tile, int first_row) {
    left_ = tile.row(first_row + device::thread_index() % device::kWarpSize / 4);
  }

  template <int NUM_RIGHT>
  EMS_DEVICE void multiply(const Tile<float, HEAD_SIZE, NUM_RIGHT>& right,
                           Products<LEFT_TILES, NUM_RIGHT>* out) const {
    constexpr int kStride = Tile<float, HEAD_SIZE, NUM_RIGHT>::kStride;
    const float* base = right.row(2 * (device::thread_index() % 4));
    out->clear();
    for (int d = 0; d < HEAD_SIZE; ++d) {
#pragma unroll
      for (int i = 0; i < LEFT_TILES; ++i) {
        const float upper = left_[16 * i * kStride + d];
        const float lower = left_[(16 * i + 8) * kStride + d];
#pragma unroll
        for (int j = 0; j < NUM_RIGHT / 8; ++j) {
          const float even = base[8 * j * kStride + d];
          const float odd = base[(8 * j + 1) * kStride + d];
          float* values = out->values[i][j];
          values[0] += upper * even;
          values[1] += upper * odd;
          values[2] += lower * even;
          values[3] += lower * odd;
        }
      }
    }
  }

 private:
  const float* left_;
};

}  // namespace ems
