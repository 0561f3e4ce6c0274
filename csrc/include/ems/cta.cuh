// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "ems/device.cuh"
#include "ems/macros.h"

// Scans and sorts by all threads of a CTA. Every function ends with a barrier, so that its shared
// memory can be used again at once.
namespace ems {

template <typename T>
EMS_DEVICE T sum_of_warp(T value) {
#pragma unroll
  for (int mask = device::kWarpSize / 2; mask > 0; mask /= 2) {
    value += device::shuffle_xor(value, mask);
  }
  return value;
}

template <typename T, int NUM_THREADS>
struct ScanShared {
  T of_warp[NUM_THREADS / device::kWarpSize];
};

template <typename T>
struct Scan {
  T before;  // sum over the threads before this one
  T total;   // sum over all threads
};

// The same result on every run: the order of summation is fixed.
template <int NUM_THREADS, typename T>
EMS_DEVICE Scan<T> scan_of_cta(T value, ScanShared<T, NUM_THREADS>* shared) {
  const int lane = device::thread_index() % device::kWarpSize;
  const int warp = device::thread_index() / device::kWarpSize;
  T through = value;
#pragma unroll
  for (int delta = 1; delta < device::kWarpSize; delta *= 2) {
    const T other = device::shuffle_up(through, delta);
    if (lane >= delta) through += other;
  }
  if (lane == device::kWarpSize - 1) shared->of_warp[warp] = through;
  device::sync_cta();
  // Not through - value, which would round.
  const T shifted = device::shuffle_up(through, 1);
  Scan<T> scan{lane == 0 ? T(0) : shifted, T(0)};
#pragma unroll 8
  for (int i = 0; i < NUM_THREADS / device::kWarpSize; ++i) {
    const T of_warp = shared->of_warp[i];
    if (i < warp) scan.before += of_warp;
    scan.total += of_warp;
  }
  device::sync_cta();
  return scan;
}

// Sorts 64-bit keys ascending, in shared or global memory; the length must be a power of two.
template <int NUM_THREADS>
EMS_DEVICE void sort_keys(uint64_t* keys, int32_t length) {
  for (int32_t size = 2; size <= length; size *= 2) {
    for (int32_t stride = size / 2; stride > 0; stride /= 2) {
      for (int32_t i = device::thread_index(); i < length / 2; i += NUM_THREADS) {
        const int32_t low = 2 * i - (i & (stride - 1));
        const uint64_t first = keys[low];
        const uint64_t second = keys[low + stride];
        const bool is_ascending = (low & size) == 0;
        if ((first > second) == is_ascending) {
          keys[low] = second;
          keys[low + stride] = first;
        }
      }
      device::sync_cta();
    }
  }
}

// The length that sort_keys needs for `count` keys; the rest is filled with kLastKey.
constexpr uint64_t kLastKey = ~uint64_t{0};

EMS_HOST_DEVICE constexpr int32_t sort_length(int64_t count) {
  int32_t length = 1;
  while (length < count) length *= 2;
  return length;
}

}  // namespace ems
