// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "dispatch.h"
#include "ems/paged_kv.h"

// From run-time values to template arguments, and what the CUDA kernels demand beyond the checks
// that all devices share.
namespace ems::cuda {

template <int VALUE>
struct Constant {
  static constexpr int value = VALUE;
};

// Calls f with a value of the C++ type of dtype and the head size as a constant.
template <typename F>
void dispatch(const char* op, DType dtype, int64_t head_size, const F& f) {
  dispatch_dtype(dtype, [&](auto element) {
    switch (head_size) {
      case 64:
        return f(element, Constant<64>{});
      case 80:
        return f(element, Constant<80>{});
      case 96:
        return f(element, Constant<96>{});
      case 128:
        return f(element, Constant<128>{});
      case 256:
        return f(element, Constant<256>{});
      default:
        throw std::runtime_error(std::string("ems_vllm::") + op +
                                 ": head_size must be 64, 80, 96, 128 or 256 on a GPU, got " +
                                 std::to_string(head_size));
    }
  });
}

// Kernels move vectors in pieces of 16 bytes.
template <typename T, typename... STRIDES>
void check_alignment(const char* op, const char* name, const void* data, STRIDES... strides) {
  const bool aligned = reinterpret_cast<uintptr_t>(data) % 16 == 0 &&
                       ((static_cast<int64_t>(strides * sizeof(T)) % 16 == 0) && ...);
  if (aligned) return;
  throw std::runtime_error(std::string("ems_vllm::") + op + ": every vector of " + name +
                           " must start at a multiple of 16 bytes");
}

template <typename T>
void check_alignment(const char* op, const char* name, const PagedTensor& cache) {
  check_alignment<T>(op, name, cache.data, cache.layer_stride, cache.block_stride,
                     cache.head_stride, cache.slot_stride);
}

}  // namespace ems::cuda
