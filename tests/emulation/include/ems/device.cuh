// SPDX-License-Identifier: Apache-2.0
#pragma once

// csrc/include/ems/device.cuh on a CPU: every CUDA thread is a fiber, see emulator.h. A fiber runs
// until it meets the others of its CTA or warp, and which one goes on then is random; so a missing
// barrier shows as a wrong result.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "ems/numeric.h"
#include "ems/shared_limits.h"
#include "ems/vector.h"
#include "emulator.h"

#define EMS_DEVICE inline
#define EMS_KERNEL(max_threads, min_ctas) void

namespace ems::device {

constexpr int kWarpSize = emulator::kWarpSize;

inline int thread_index() { return emulator::thread().index; }
inline int64_t cta_x() { return emulator::cta().x; }
inline int64_t cta_y() { return emulator::cta().y; }
inline int64_t cta_z() { return emulator::cta().z; }

template <typename SHARED, int64_t MAX_BYTES = kSharedBytesAnywhere>
SHARED& shared_memory() {
  static_assert(sizeof(SHARED) <= MAX_BYTES, "more shared memory than a CTA gets");
  emulator::require(sizeof(SHARED) <= emulator::cta().shared.size(),
                    "a kernel uses more shared memory than its launch gives");
  return *reinterpret_cast<SHARED*>(emulator::cta().shared.data());
}

inline void sync_cta() { emulator::sync_cta(); }
inline void sync_warp() { emulator::sync_warp(); }

// What lane `source(lane)` passed; a lane without a source keeps its own.
template <typename T, typename F>
T exchange(T value, const F& source) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  auto& warp = emulator::warp();
  const int lane = thread_index() % kWarpSize;
  warp.exchange[lane] = bits;
  sync_warp();
  const int from = source(lane);
  if (0 <= from && from < kWarpSize) bits = warp.exchange[from];
  sync_warp();
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

template <typename T>
T shuffle_xor(T value, int mask) {
  return exchange(value, [&](int lane) { return lane ^ mask; });
}
template <typename T>
T shuffle_up(T value, int delta) {
  return exchange(value, [&](int lane) { return lane - delta; });
}
template <typename T>
T shuffle_from(T value, int source) {
  return exchange(value, [&](int) { return source; });
}

inline uint32_t ballot(bool value) {
  auto& warp = emulator::warp();
  const int lane = thread_index() % kWarpSize;
  warp.exchange[lane] = value;
  sync_warp();
  uint32_t bits = 0;
  for (int i = 0; i < kWarpSize; ++i) bits |= static_cast<uint32_t>(warp.exchange[i]) << i;
  sync_warp();
  return bits;
}

inline int count_bits(uint32_t bits) { return __builtin_popcount(bits); }

inline void add_shared(int32_t* counter, int32_t value) { *counter += value; }
inline void min_shared(int32_t* value, int32_t other) { *value = other < *value ? other : *value; }
inline void max_shared(int32_t* value, int32_t other) { *value = other > *value ? other : *value; }

inline float exp2_fast(float x) { return std::exp2(x); }
inline float log2_accurate(float x) { return std::log2(x); }

// The copy happens when it is waited for, not before.
inline void copy_async(void* shared, const void* global) {
  emulator::require(reinterpret_cast<uintptr_t>(shared) % 16 == 0 &&
                        reinterpret_cast<uintptr_t>(global) % 16 == 0,
                    "an asynchronous copy is not aligned");
  emulator::thread().copies.push_back({shared, global});
}
inline void commit_copies() {
  auto& thread = emulator::thread();
  thread.groups.push_back(std::move(thread.copies));
  thread.copies.clear();
}
template <int NUM_PENDING>
void wait_for_copies() {
  auto& groups = emulator::thread().groups;
  while (groups.size() > NUM_PENDING) {
    for (const auto& [to, from] : groups.front()) std::memcpy(to, from, 16);
    groups.pop_front();
  }
}

inline void load_matrices(uint32_t (&out)[4], const void* shared_row) {
  emulator::require(reinterpret_cast<uintptr_t>(shared_row) % 16 == 0, "a matrix is not aligned");
  auto& warp = emulator::warp();
  const int lane = thread_index() % kWarpSize;
  warp.exchange[lane] = reinterpret_cast<uint64_t>(shared_row);
  sync_warp();
  for (int i = 0; i < 4; ++i) {
    const auto* row = reinterpret_cast<const unsigned char*>(warp.exchange[8 * i + lane / 4]);
    std::memcpy(&out[i], row + 4 * (lane % 4), 4);
  }
  sync_warp();
}

inline void load_matrices_transposed(uint32_t (&out)[4], const void* shared_row) {
  emulator::require(reinterpret_cast<uintptr_t>(shared_row) % 16 == 0, "a matrix is not aligned");
  auto& warp = emulator::warp();
  const int lane = thread_index() % kWarpSize;
  warp.exchange[lane] = reinterpret_cast<uint64_t>(shared_row);
  sync_warp();
  for (int i = 0; i < 4; ++i) {
    uint16_t pair[2];
    for (int k = 0; k < 2; ++k) {
      const int row = 2 * (lane % 4) + k;
      const auto* elements = reinterpret_cast<const uint16_t*>(warp.exchange[8 * i + row]);
      pair[k] = elements[lane / 4];
    }
    std::memcpy(&out[i], pair, 4);
  }
  sync_warp();
}

template <typename T>
float half_of(uint32_t pair, int which) {
  return to_float(T{static_cast<uint16_t>(pair >> (16 * which))});
}

template <typename T>
void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  auto& warp = emulator::warp();
  const int lane = thread_index() % kWarpSize;
  for (int i = 0; i < 4; ++i) warp.left[lane][i] = a[i];
  warp.right[lane][0] = b0;
  warp.right[lane][1] = b1;
  sync_warp();
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + i / 2 * 8;
    const int column = 2 * (lane % 4) + i % 2;
    float sum = 0;
    for (int k = 0; k < 16; ++k) {
      const int left_lane = row % 8 * 4 + k % 8 / 2;
      const int right_lane = column * 4 + k % 8 / 2;
      const uint32_t left = warp.left[left_lane][row / 8 + k / 8 * 2];
      const uint32_t right = warp.right[right_lane][k / 8];
      sum += half_of<T>(left, k % 2) * half_of<T>(right, k % 2);
    }
    c[i] += sum;
  }
  sync_warp();
}

template <typename T>
T round_to(float value) {
  T out;
  from_float(value, &out);
  return out;
}

template <typename T>
float widen(T value) {
  return to_float(value);
}

template <typename T>
void widen_vector(const Vector16& packed, Vector16 (&out)[2]) {
  emulator::require(reinterpret_cast<uintptr_t>(out) % 16 == 0, "a vector is not aligned");
  Float8E4M3 narrow[16];
  T wide[16];
  std::memcpy(narrow, &packed, sizeof(narrow));
  for (int i = 0; i < 16; ++i) wide[i] = round_to<T>(widen(narrow[i]));
  std::memcpy(out, wide, sizeof(wide));
}

inline uint32_t float_bits(float value) { return bit_cast<uint32_t>(value); }

}  // namespace ems::device
