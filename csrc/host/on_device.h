// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "checks.h"
#include "launchers.h"

#if EMS_WITH_CUDA
#include "cuda/stream.h"
#endif

// Included in angle brackets, so that the stand-ins of tests/emulation and tests/nullgpu, which
// come first on the path, are found instead.
//
// Chooses the kernel of the tensors' device. Without nvcc there are none for CUDA, and torch itself
// answers that the operator has no implementation there.
namespace ems {

template <typename CPU, typename CUDA>
void on_device(const ArgumentChecks& checks, const CPU& on_cpu, const CUDA& on_cuda) {
#if EMS_WITH_CUDA
  if (!checks.is_cpu()) {
    const cuda::TorchStream stream(checks.device_index());
    on_cuda(stream.stream());
    return;
  }
#endif
  on_cpu();
}

}  // namespace ems
