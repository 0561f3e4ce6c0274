// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

// Launching a kernel from host code; tests/emulation/ has the counterpart.
namespace ems {

struct Grid {
  int64_t x;
  int64_t y = 1;
  int64_t z = 1;
};

inline void check_cuda(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(std::string("ems_vllm: ") + what + ": " + cudaGetErrorString(status));
}

// 10 * major + minor of the current device.
inline int compute_capability() {
  int device = 0, major = 0, minor = 0;
  check_cuda(cudaGetDevice(&device), "current device");
  check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device),
             "capability");
  check_cuda(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device),
             "capability");
  return 10 * major + minor;
}

// Of the current device.
inline int multiprocessor_count() {
  int device = 0, count = 0;
  check_cuda(cudaGetDevice(&device), "current device");
  check_cuda(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device),
             "multiprocessors");
  return count;
}

// Lets a kernel have more shared memory than it gets unasked.
inline void allow_shared_bytes(const char* name, const void* kernel, int64_t num_bytes) {
  const cudaError_t status = cudaFuncSetAttribute(
      kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(num_bytes));
  if (status == cudaSuccess) return;
  // "Invalid argument" would not say which.
  int device = 0, allowed = 0;
  check_cuda(cudaGetDevice(&device), "current device");
  check_cuda(cudaDeviceGetAttribute(&allowed, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
             "shared memory");
  throw std::runtime_error(std::string("ems_vllm: ") + name + ": a CTA asks for " +
                           std::to_string(num_bytes) + " bytes of shared memory, the GPU gives " +
                           std::to_string(allowed) + ": " + cudaGetErrorString(status));
}

// Runs `kernel` on a stream; an empty grid is no work.
template <typename... PARAMS>
void launch(const char* name, void (*kernel)(PARAMS...), Grid grid, int num_threads,
            int64_t shared_bytes, void* stream, std::type_identity_t<PARAMS>... args) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  constexpr int64_t kDefaultSharedBytes = 48 << 10;
  if (shared_bytes > kDefaultSharedBytes) {
    allow_shared_bytes(name, reinterpret_cast<const void*>(kernel), shared_bytes);
  }
  void* addresses[] = {&args...};
  const dim3 dims(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y),
                  static_cast<unsigned>(grid.z));
  check_cuda(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dims,
                              dim3(static_cast<unsigned>(num_threads)), addresses,
                              static_cast<size_t>(shared_bytes), static_cast<cudaStream_t>(stream)),
             name);
}

}  // namespace ems
