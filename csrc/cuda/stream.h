// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "launchers.h"

namespace ems::cuda {

// Torch's current stream of a device, which it makes the current one, and memory of torch's
// caching allocator, which knows that streams run in order.
class TorchStream {
 public:
  explicit TorchStream(int32_t device_index);

  TorchStream(const TorchStream&) = delete;
  TorchStream& operator=(const TorchStream&) = delete;

  const Stream& stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  std::vector<torch::stable::Tensor> allocations_;
  Stream stream_;
};

}  // namespace ems::cuda
