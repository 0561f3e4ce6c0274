// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <cstring>

#include "ems/device.cuh"

// csrc/include/ems/device_sm90.cuh on a CPU. Products of groups run when they are waited for, and
// read shared memory as it is then.

#define EMS_IS_SM90A 1
#define EMS_HAS_SM90A 1

namespace ems::device {

constexpr int kGroupSize = 128;

inline void trap() { emulator::require(false, "a kernel for 9.0a runs on another GPU"); }

struct Barrier {
  int32_t count;
  int16_t num_pending;
  int16_t phase;

  void init(int num_threads) {
    count = num_threads;
    num_pending = static_cast<int16_t>(num_threads);
    phase = 0;
  }
  void arrive() {
    if (--num_pending > 0) return;
    num_pending = static_cast<int16_t>(count);
    ++phase;
  }
  // The phase with this parity is complete when the current one has the other.
  void wait(int parity) {
    while (phase % 2 == parity) emulator::give_way();
  }
};

inline void publish_to_groups() {}
inline void begin_group_products() {}

inline void commit_group_products() {
  auto& thread = emulator::thread();
  thread.product_groups.push_back(std::move(thread.products));
  thread.products.clear();
}

template <int NUM_PENDING>
void wait_for_group_products() {
  auto& groups = emulator::thread().product_groups;
  while (groups.size() > NUM_PENDING) {
    for (auto& product : groups.front()) product.run(product);
    groups.pop_front();
  }
}

template <int N>
void pin(float (&)[N][4]) {}

// A tile's address and, in its lowest bits, that of the columns within a row.
inline uint64_t describe_columns(const void* tile) {
  const auto address = reinterpret_cast<uint64_t>(tile);
  emulator::require(address % 1024 == 0, "a swizzled tile is not aligned");
  return address;
}
inline uint64_t advance_columns(uint64_t columns, int num_bytes) { return columns + num_bytes; }

template <typename T, int N>
void run_group_product(emulator::GroupProduct& product) {
  auto& warp = emulator::warp();
  const int lane = thread_index() % kWarpSize;
  for (int i = 0; i < 4; ++i) warp.left[lane][i] = product.left[i];
  sync_warp();
  const uint64_t first_byte = product.right % 1024;
  emulator::require(first_byte % 32 == 0 && first_byte < 128, "columns beyond a swizzled tile");
  const auto* tile = reinterpret_cast<const T*>(product.right - first_byte);
  const int first_column = static_cast<int>(first_byte / sizeof(T));
  for (int j = 0; j < N / 8; ++j) {
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + i / 2 * 8;
      const int right_row = 8 * j + 2 * (lane % 4) + i % 2;
      float sum = 0;
      for (int k = 0; k < 16; ++k) {
        const uint32_t left = warp.left[row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2];
        const int column = first_column + k;
        const int chunk = (column / 8) ^ (right_row % 8);
        sum += half_of<T>(left, k % 2) * to_float(tile[right_row * 64 + chunk * 8 + column % 8]);
      }
      product.sums[j][i] = sum + (product.accumulate ? product.sums[j][i] : 0.0f);
    }
  }
  sync_warp();
}

template <typename T, int N>
void group_multiply(float (&c)[N / 8][4], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  emulator::GroupProduct product{
      c, {a[0], a[1], a[2], a[3]}, b, accumulate, &run_group_product<T, N>};
  emulator::thread().products.push_back(product);
}

}  // namespace ems::device
