// SPDX-License-Identifier: Apache-2.0

// A kernel with one mistake at a time, to show that the emulator notices each.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <string>

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
  kTooMuchShared,
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
  device::copy_async(slot, in + 4 * t + (fault == kMisalignedCopy), true);
  device::commit_copies();
  if (fault != kCopyNotWaitedFor) device::wait_for_copies<0>();
  if (fault != kNoBarrier && (fault != kBarrierPassedBy || t % 2 == 0)) device::sync_cta();
  for (int i = 0; i < 4; ++i) out[4 * t + i] = shared.values[kThreads - 1 - t][i];
}

void reverse(const torch::stable::Tensor& in, const torch::stable::Tensor& out, int64_t fault) {
  int64_t shared_bytes = sizeof(Shared);
  if (fault == kTooLittleShared) shared_bytes /= 2;
  if (fault == kTooMuchShared) shared_bytes = 300 << 10;
  launch("reverse", reverse_kernel, {1}, kThreads, shared_bytes, nullptr,
         static_cast<const float*>(in.const_data_ptr()),
         static_cast<float*>(out.mutable_data_ptr()), fault);
}

}  // namespace
}  // namespace ems

STABLE_TORCH_LIBRARY(ems_vllm_faults, m) {
  m.def("reverse(Tensor values, Tensor(a!) out, int fault) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(ems_vllm_faults, CPU, m) { m.impl("reverse", TORCH_BOX(&ems::reverse)); }
