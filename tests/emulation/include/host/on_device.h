// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstring>
#include <memory>
#include <vector>

#include "checks.h"
#include "launchers.h"

// csrc/host/on_device.h for the emulated library: CPU tensors, CUDA kernels.
namespace ems {

template <typename CPU, typename CUDA>
void on_device(const ArgumentChecks& checks, const CPU& on_cpu, const CUDA& on_cuda) {
  std::vector<std::unique_ptr<float[]>> allocations;
  on_cuda(cuda::Stream{nullptr, [&](int64_t num_bytes) -> void* {
                         // NaN, since a GPU's memory holds whatever was there.
                         allocations.emplace_back(new float[num_bytes / 4 + 4]);
                         std::memset(allocations.back().get(), 0xff, num_bytes);
                         return allocations.back().get();
                       }});
}

}  // namespace ems
