// SPDX-License-Identifier: Apache-2.0

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>

#include "model.h"

namespace nullgpu {
namespace {

thread_local int device = 0;

int number_from(const char* variable, int otherwise) {
  const char* value = std::getenv(variable);
  return value == nullptr || *value == '\0' ? otherwise : std::atoi(value);
}

// Of a CTA and of a multiprocessor, in KiB, by compute capability (CUDA's programming guide).
Properties properties_of(int capability) {
  int cta = 163, multiprocessor = 164;
  switch (capability) {
    case 86:
    case 89:
    case 120:
    case 121:
      cta = 99, multiprocessor = 100;
      break;
    case 90:
    case 100:
    case 103:
      cta = 227, multiprocessor = 228;
      break;
    default:
      break;
  }
  return {capability / 10, capability % 10, cta << 10, multiprocessor << 10};
}

// What it does not say is 1: a yes, or a harmless number.
const std::map<int, int>& attributes() {
  static const std::map<int, int> all = {
      {cudaDevAttrMaxThreadsPerBlock, 1024},
      {cudaDevAttrMaxBlockDimX, 1024},
      {cudaDevAttrMaxBlockDimY, 1024},
      {cudaDevAttrMaxBlockDimZ, 64},
      {cudaDevAttrMaxGridDimX, 2147483647},
      {cudaDevAttrMaxGridDimY, 65535},
      {cudaDevAttrMaxGridDimZ, 65535},
      {cudaDevAttrMaxSharedMemoryPerBlock, kDefaultSharedBytes},
      {cudaDevAttrTotalConstantMemory, 65536},
      {cudaDevAttrWarpSize, 32},
      {cudaDevAttrMaxPitch, 2147483647},
      {cudaDevAttrMaxRegistersPerBlock, 65536},
      {cudaDevAttrClockRate, 1980000},
      {cudaDevAttrMultiProcessorCount, 132},
      {cudaDevAttrKernelExecTimeout, 0},
      {cudaDevAttrIntegrated, 0},
      {cudaDevAttrComputeMode, 0},
      {cudaDevAttrMemoryClockRate, 2619000},
      {cudaDevAttrGlobalMemoryBusWidth, 5120},
      {cudaDevAttrL2CacheSize, 52428800},
      {cudaDevAttrMaxThreadsPerMultiProcessor, 2048},
      {cudaDevAttrComputeCapabilityMajor, properties().major},
      {cudaDevAttrComputeCapabilityMinor, properties().minor},
      {cudaDevAttrMaxSharedMemoryPerMultiprocessor,
       static_cast<int>(properties().shared_bytes_per_multiprocessor)},
      {cudaDevAttrMaxRegistersPerMultiprocessor, 65536},
      {cudaDevAttrMaxSharedMemoryPerBlockOptin,
       static_cast<int>(properties().shared_bytes_per_cta)},
      {cudaDevAttrMaxBlocksPerMultiprocessor, 32},
      // Multicast, which only the driver names: collectives are NCCL's alone.
      {132, 0},
  };
  return all;
}

}  // namespace

int num_physical_devices() {
  static const int all = number_from("NULLGPU_COUNT", 1);
  return all;
}

int num_devices() {
  const int all = num_physical_devices();
  // As the driver takes it: those that are named are there.
  static const int visible = [all] {
    const char* named = std::getenv("CUDA_VISIBLE_DEVICES");
    if (named == nullptr) return all;
    const int count = *named == '\0' ? 0 : 1 + std::count(named, named + std::strlen(named), ',');
    return std::min(count, all);
  }();
  return visible;
}

int current_device() { return device; }

cudaError_t set_device(int wanted) {
  if (wanted < 0 || wanted >= num_devices()) return cudaErrorInvalidDevice;
  device = wanted;
  return cudaSuccess;
}

const Properties& properties() {
  static const Properties found = properties_of(number_from("NULLGPU_CAPABILITY", 90));
  return found;
}

int attribute(int number) {
  const auto found = attributes().find(number);
  return found == attributes().end() ? 1 : found->second;
}

}  // namespace nullgpu
