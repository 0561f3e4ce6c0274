// SPDX-License-Identifier: Apache-2.0

#include "cuda/stream.h"

#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <stdexcept>

namespace ems::cuda {
namespace {

constexpr const char* kCurrentStream = "aoti_torch_get_current_cuda_stream";

// Part of torch's stable ABI, but only a torch with CUDA has it, and the same library must load
// without. Such a torch has loaded libtorch_cuda.so long before, as a rule not for all to see.
void* find_current_stream() {
  if (void* found = dlsym(RTLD_DEFAULT, kCurrentStream)) return found;
  void* torch_cuda = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  return torch_cuda != nullptr ? dlsym(torch_cuda, kCurrentStream) : nullptr;
}

void* current_stream(int32_t device_index) {
  using Function = AOTITorchError (*)(int32_t, void**);
  static const auto get = reinterpret_cast<Function>(find_current_stream());
  void* stream = nullptr;
  if (get == nullptr || get(device_index, &stream) != AOTI_TORCH_SUCCESS) {
    throw std::runtime_error(
        "ems_vllm: this torch tells no CUDA stream; use a CUDA build of torch");
  }
  return stream;
}

}  // namespace

TorchStream::TorchStream(int32_t device_index) : guard_(device_index) {
  stream_.handle = current_stream(device_index);
  stream_.allocate = [this, device_index](int64_t num_bytes) {
    allocations_.push_back(torch::stable::empty(
        {num_bytes}, torch::headeronly::ScalarType::Byte, std::nullopt,
        torch::stable::Device(torch::headeronly::DeviceType::CUDA, device_index)));
    return allocations_.back().mutable_data_ptr();
  };
}

}  // namespace ems::cuda
