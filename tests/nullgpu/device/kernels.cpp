// SPDX-License-Identifier: Apache-2.0

#include <cxxabi.h>

#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>

#include "model.h"

namespace nullgpu {
namespace {

constexpr unsigned kMaxThreads = 1024;
constexpr unsigned kMaxGridYZ = 65535;

std::mutex mutex;
std::map<const void*, Kernel> kernels;
std::map<const void*, const char*> mangled_names;

std::string demangled(const char* name) {
  int status = 0;
  const std::unique_ptr<char, decltype(&std::free)> text(
      abi::__cxa_demangle(name, nullptr, nullptr, &status), &std::free);
  return status == 0 ? text.get() : name;
}

}  // namespace

void register_kernel(const void* function, const char* mangled) {
  const std::lock_guard<std::mutex> lock(mutex);
  mangled_names[function] = mangled;
}

Kernel& kernel_of(const void* function) {
  const std::lock_guard<std::mutex> lock(mutex);
  const auto [found, is_new] = kernels.try_emplace(function);
  if (is_new) {
    // Demangled when it is first used: libraries register thousands.
    const auto name = mangled_names.find(function);
    found->second.name = name == mangled_names.end() ? "unknown" : demangled(name->second);
  }
  return found->second;
}

cudaError_t allow_shared_bytes(Kernel& kernel, int64_t num_bytes) {
  if (num_bytes < 0 || num_bytes > properties().shared_bytes_per_cta) {
    return refuse(kernel.name.c_str(), cudaErrorInvalidValue);
  }
  kernel.max_shared_bytes = num_bytes > kDefaultSharedBytes ? num_bytes : kDefaultSharedBytes;
  return cudaSuccess;
}

cudaError_t launch(const Kernel& kernel, Dims grid, Dims cta, int64_t shared_bytes,
                   Stream& stream) {
  const uint64_t num_threads = uint64_t{cta.x} * cta.y * cta.z;
  const bool has_grid = grid.x > 0 && grid.y > 0 && grid.z > 0;
  if (!has_grid || grid.x > 0x7fffffffu || grid.y > kMaxGridYZ || grid.z > kMaxGridYZ ||
      num_threads == 0 || num_threads > kMaxThreads) {
    return refuse(kernel.name.c_str(), cudaErrorInvalidConfiguration, &stream);
  }
  if (shared_bytes > kernel.max_shared_bytes) {
    return refuse(kernel.name.c_str(), cudaErrorInvalidValue, &stream);
  }
  return submit(stream, {"launch", kernel.name, nullptr});
}

}  // namespace nullgpu
