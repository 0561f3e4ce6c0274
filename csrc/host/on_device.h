// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "checks.h"
#include "launchers.h"

#if EMS_WITH_CUDA
#include "cuda/stream.h"
#endif

// Chooses the kernel of the tensors' device. Without nvcc there are none for CUDA, and torch itself
// answers that the operator has no implementation there.
namespace ems {

template <typename CPU, typename CUDA>
void on_device(const ArgumentChecks& checks, const CPU& on_cpu, const CUDA& on_cuda) {
#if EMS_WITH_CUDA
  if (!checks.is_cpu()) {
    const cuda::TorchQueue queue(checks.device_index());
    on_cuda(queue.queue());
    return;
  }
#endif
  on_cpu();
}

}  // namespace ems
