// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <string>
#include <type_traits>

#include "emulator.h"
#include "model.h"

// csrc/include/ems/launch.cuh on the null GPU: kernels are work of a stream, as on a GPU, and
// tests/emulation computes them; when a graph is launched, again.
namespace ems {

inline int compute_capability() {
  const nullgpu::Properties& properties = nullgpu::properties();
  return 10 * properties.major + properties.minor;
}

inline int multiprocessor_count() { return nullgpu::attribute(cudaDevAttrMultiProcessorCount); }

struct Grid {
  int64_t x;
  int64_t y = 1;
  int64_t z = 1;
};

template <typename... PARAMS>
void launch(const char* name, void (*kernel)(PARAMS...), Grid grid, int num_threads,
            int64_t shared_bytes, void* stream, std::type_identity_t<PARAMS>... args) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  const auto compute = [=] {
    emulator::run(name, grid.x, grid.y, grid.z, num_threads, shared_bytes,
                  [&] { kernel(args...); });
  };
  const cudaError_t status =
      nullgpu::submit(nullgpu::stream_of(stream), {"launch", std::string("ems::") + name, compute});
  emulator::require(status == cudaSuccess, name);
}

}  // namespace ems
