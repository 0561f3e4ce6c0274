// SPDX-License-Identifier: Apache-2.0
// libnvidia-ml: what vLLM asks before it touches CUDA.

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "model.h"

namespace {

constexpr int kSuccess = 0;
constexpr int kNotFound = 6;
constexpr int kNotSupported = 3;

// A device is known by its index, from 1 on so that no handle is null.
void* handle_of(unsigned index) { return reinterpret_cast<void*>(uintptr_t{index} + 1); }
unsigned index_of(void* handle) {
  return static_cast<unsigned>(reinterpret_cast<uintptr_t>(handle) - 1);
}

struct Memory {
  unsigned long long total, free, used;
};
struct MemoryV2 {
  unsigned version;
  unsigned long long total, reserved, free, used;
};

}  // namespace

extern "C" {

int nvmlInit() { return kSuccess; }
int nvmlInit_v2() { return kSuccess; }
int nvmlInitWithFlags(unsigned) { return kSuccess; }
int nvmlShutdown() { return kSuccess; }
const char* nvmlErrorString(int) { return "an error of the null GPU"; }
int nvmlSystemGetDriverVersion(char* text, unsigned size) {
  std::snprintf(text, size, "580.159.04");
  return kSuccess;
}
int nvmlSystemGetCudaDriverVersion_v2(int* version) {
  *version = 13000;
  return kSuccess;
}
int nvmlDeviceGetCount_v2(unsigned* count) {
  *count = nullgpu::num_physical_devices();
  return kSuccess;
}
int nvmlDeviceGetCount(unsigned* count) { return nvmlDeviceGetCount_v2(count); }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void** handle) {
  *handle = handle_of(index);
  return static_cast<int>(index) < nullgpu::num_physical_devices() ? kSuccess : kNotFound;
}
int nvmlDeviceGetHandleByUUID(const char* uuid, void** handle) {
  return nvmlDeviceGetHandleByIndex_v2(std::atoi(uuid + std::strlen(uuid) - 2), handle);
}
int nvmlDeviceGetHandleByPciBusId_v2(const char* id, void** handle) {
  unsigned domain = 0, bus = 1;
  std::sscanf(id, "%x:%x", &domain, &bus);
  return nvmlDeviceGetHandleByIndex_v2(bus - 1, handle);
}
int nvmlDeviceGetIndex(void* handle, unsigned* index) {
  *index = index_of(handle);
  return kSuccess;
}
int nvmlDeviceGetName(void*, char* name, unsigned size) {
  std::snprintf(name, size, "%s", nullgpu::kName);
  return kSuccess;
}
int nvmlDeviceGetUUID(void* handle, char* text, unsigned size) {
  std::snprintf(text, size, "GPU-00000000-0000-0000-0000-0000000000%02u", index_of(handle));
  return kSuccess;
}
int nvmlDeviceGetCudaComputeCapability(void*, int* major, int* minor) {
  *major = nullgpu::properties().major;
  *minor = nullgpu::properties().minor;
  return kSuccess;
}
int nvmlDeviceGetMemoryInfo(void*, Memory* memory) {
  *memory = {nullgpu::kMemoryBytes, nullgpu::kMemoryBytes - nullgpu::kReservedBytes,
             nullgpu::kReservedBytes};
  return kSuccess;
}
int nvmlDeviceGetMemoryInfo_v2(void*, MemoryV2* memory) {
  *memory = {memory->version, nullgpu::kMemoryBytes, 0,
             nullgpu::kMemoryBytes - nullgpu::kReservedBytes, nullgpu::kReservedBytes};
  return kSuccess;
}
// What torch asks when memory has run out.
int nvmlDeviceGetComputeRunningProcesses(void*, unsigned* count, void*) {
  *count = 0;
  return kSuccess;
}
int nvmlDeviceGetNvLinkRemoteDeviceType(void*, unsigned, int*) { return kNotSupported; }
int nvmlDeviceGetNvLinkRemotePciInfo_v2(void*, unsigned, void*) { return kNotSupported; }
int nvmlDeviceGetGpuFabricInfoV(void*, void*) { return kNotSupported; }
int nvmlDeviceGetNumaNodeId(void*, unsigned*) { return kNotSupported; }
int nvmlDeviceGetCpuAffinity(void*, unsigned, unsigned long*) { return kNotSupported; }
int nvmlDeviceGetP2PStatus(void*, void*, int, int* status) {
  *status = 5;  // "unknown": no peer reaches another
  return kSuccess;
}
}
