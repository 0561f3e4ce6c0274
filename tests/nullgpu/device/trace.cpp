// SPDX-License-Identifier: Apache-2.0

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <mutex>

#include "model.h"

namespace nullgpu {
namespace {

std::mutex mutex;
std::atomic<bool> is_listening{false};
std::string text;

}  // namespace

void note(const char* kind, const char* how, const std::string& name, const Stream* stream) {
  if (!is_listening) return;
  const std::lock_guard<std::mutex> lock(mutex);
  text += std::string(kind) + '\t' + how + '\t' + std::to_string(stream ? stream->device : -1) +
          '\t' + std::to_string(stream ? stream->id : -1) + '\t' + name + '\n';
}

cudaError_t refuse(const char* what, cudaError_t error, const Stream* stream) {
  note("error", "refused", std::to_string(error) + ' ' + what, stream);
  return error;
}

}  // namespace nullgpu

// For Python: trace.py.
extern "C" {

void nullgpu_listen(int on) { nullgpu::is_listening = on != 0; }

// Everything noted since the last call, a line each: kind, how, device, stream, name. The caller
// frees it with nullgpu_free.
char* nullgpu_take() {
  const std::lock_guard<std::mutex> lock(nullgpu::mutex);
  char* taken = strdup(nullgpu::text.c_str());
  nullgpu::text.clear();
  return taken;
}

void nullgpu_free(char* taken) { std::free(taken); }
}
