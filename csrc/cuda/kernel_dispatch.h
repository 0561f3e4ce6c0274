// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

#include "cuda/head_sizes.h"
#include "dispatch.h"
#include "ems/paged_kv.h"

// From run-time values to template arguments, and what the CUDA kernels demand beyond the checks
// that all devices share.
namespace ems::cuda {

template <int VALUE>
struct Constant {
  static constexpr int value = VALUE;
};

// Calls f with the one of SIZES that head_size is, if any.
template <typename F, int... SIZES>
bool call_with(int64_t head_size, const F& f, std::integer_sequence<int, SIZES...>) {
  return ((head_size == SIZES && (f(Constant<SIZES>{}), true)) || ...);
}

// "a, b, c"
template <int... SIZES>
std::string listed(std::integer_sequence<int, SIZES...>) {
  std::string text;
  ((text += (text.empty() ? "" : ", ") + std::to_string(SIZES)), ...);
  return text;
}

// Calls f with the head size as a constant.
template <typename F>
void dispatch_head_size(const char* op, int64_t head_size, const F& f) {
  if (call_with(head_size, f, HeadSizes{})) return;
  throw std::runtime_error(std::string("ems_vllm::") + op + ": head_size must be one of " +
                           listed(HeadSizes{}) + " on a GPU, got " + std::to_string(head_size));
}

// Calls f with a value of the C++ type of a cache's dtype and the head size as a constant.
template <typename F>
void dispatch(const char* op, DType cache_dtype, int64_t head_size, const F& f) {
  dispatch_cache_dtype(cache_dtype, [&](auto cached) {
    dispatch_head_size(op, head_size, [&](auto size) { f(cached, size); });
  });
}

// Calls f with values of the C++ types of queries and of the cache they go with, and the head size
// as a constant.
template <typename F>
void dispatch(const char* op, DType query_dtype, DType cache_dtype, int64_t head_size, const F& f) {
  dispatch_dtypes(op, query_dtype, cache_dtype, QueryCachePairs{}, [&](auto element, auto cached) {
    dispatch_head_size(op, head_size, [&](auto size) { f(element, cached, size); });
  });
}

// What the elements of a cache are computed with: float8 has no arithmetic of its own, and every
// value of it is one of bfloat16.
template <typename C>
using ComputeType = std::conditional_t<std::is_same_v<C, Float8E4M3>, BFloat16, C>;

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
