// SPDX-License-Identifier: Apache-2.0

// A kernel with one mistake at a time, to show that the emulator notices each, and the batches that
// launchers divide their items into.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include "cuda/item_batches.h"
#include "ems/device.cuh"
#include "ems/launch.cuh"

namespace ems {
namespace {

constexpr int kThreads = 64;

enum Fault : int64_t {
  kNone,
  kNoBarrier,
  kCopyNotWaitedFor,
  kBarrierPassedBy,
  kTooLittleShared,
  kMisalignedCopy,
};

struct Shared {
  alignas(16) float values[kThreads][4];
};

// One CTA: thread t writes what thread kThreads - 1 - t has fetched.
void reverse_kernel(const float* in, float* out, int64_t fault) {
  auto& shared = device::shared_memory<Shared>();
  const int t = device::thread_index();
  float* slot = shared.values[t];
  device::copy_async(slot, in + 4 * t + (fault == kMisalignedCopy));
  device::commit_copies();
  if (fault != kCopyNotWaitedFor) device::wait_for_copies<0>();
  if (fault != kNoBarrier && (fault != kBarrierPassedBy || t % 2 == 0)) device::sync_cta();
  for (int i = 0; i < 4; ++i) out[4 * t + i] = shared.values[kThreads - 1 - t][i];
}

// shared_bytes: 0 for what the kernel needs.
void reverse(const torch::stable::Tensor& in, const torch::stable::Tensor& out, int64_t fault,
             int64_t shared_bytes) {
  if (shared_bytes == 0) shared_bytes = sizeof(Shared);
  if (fault == kTooLittleShared) shared_bytes /= 2;
  launch("reverse", reverse_kernel, {1}, kThreads, shared_bytes, nullptr,
         static_cast<const float*>(in.const_data_ptr()),
         static_cast<float*>(out.mutable_data_ptr()), fault);
}

// Writes the size of every batch; returns how many there are.
int64_t item_batches(const torch::stable::Tensor& sizes, int64_t num_items, int64_t scratch,
                     int64_t group) {
  auto* out = static_cast<int64_t*>(sizes.mutable_data_ptr());
  int64_t num_batches = 0, next = 0;
  const cuda::Stream stream{nullptr, [](int64_t) -> void* { return nullptr; }};
  cuda::for_item_batches(
      num_items, scratch, group, stream, [&](int64_t first, int64_t count, void*) {
        emulator::require(first == next, "a batch does not begin where the last one ended");
        emulator::require(num_batches < sizes.numel(), "more batches than there is room for");
        out[num_batches++] = count;
        next = first + count;
      });
  return num_batches;
}

}  // namespace
}  // namespace ems

STABLE_TORCH_LIBRARY(ems_vllm_faults, m) {
  m.def("reverse(Tensor values, Tensor(a!) out, int fault, int shared_bytes) -> ()");
  m.def("item_batches(Tensor(a!) sizes, int num_items, int scratch, int group) -> int");
}
STABLE_TORCH_LIBRARY_IMPL(ems_vllm_faults, CPU, m) {
  m.impl("reverse", TORCH_BOX(&ems::reverse));
  m.impl("item_batches", TORCH_BOX(&ems::item_batches));
}
