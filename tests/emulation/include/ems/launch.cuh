// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <type_traits>

#include "emulator.h"

// csrc/include/ems/launch.cuh on a CPU.
namespace ems {

inline int compute_capability() { return emulator::compute_capability(); }

// As an H100 has; what work is shared out over them may depend on it, but no result.
inline int multiprocessor_count() { return 132; }

struct Grid {
  int64_t x;
  int64_t y = 1;
  int64_t z = 1;
};

template <typename... PARAMS>
void launch(const char* name, void (*kernel)(PARAMS...), Grid grid, int num_threads,
            int64_t shared_bytes, void* stream, std::type_identity_t<PARAMS>... args) {
  emulator::run(name, grid.x, grid.y, grid.z, num_threads, shared_bytes, [&] { kernel(args...); });
}

}  // namespace ems
