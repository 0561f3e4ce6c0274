// SPDX-License-Identifier: Apache-2.0
// Of NCCL what torch and vLLM call; libraries.py adds the rest by name. Nothing is sent: a
// collective is one launch, and its output is what was there.

#include <cstddef>

#include "model.h"

namespace {

constexpr int kSuccess = 0;
constexpr int kUnhandledCudaError = 1;

int collective(void* stream, const char* name) {
  nullgpu::Stream& where = nullgpu::stream_of(stream);
  return nullgpu::submit(where, {"launch", name, nullptr}) == cudaSuccess ? kSuccess
                                                                          : kUnhandledCudaError;
}

int new_communicator(void** communicator) {
  static char one;
  *communicator = &one;
  return kSuccess;
}

}  // namespace

extern "C" {

int ncclGetVersion(int* version) {
  *version = 22809;
  return kSuccess;
}
struct UniqueId {
  char bytes[128];
};
int ncclGetUniqueId(UniqueId* id) {
  *id = {};
  return kSuccess;
}
const char* ncclGetErrorString(int) { return "null"; }
const char* ncclGetLastError(void*) { return "null"; }
int ncclCommInitRank(void** communicator, int, UniqueId, int) {
  return new_communicator(communicator);
}
int ncclCommInitRankConfig(void** communicator, int, UniqueId, int, void*) {
  return new_communicator(communicator);
}
int ncclCommInitRankScalable(void** communicator, int, int, int, UniqueId*, void*) {
  return new_communicator(communicator);
}
int ncclCommSplit(void*, int, int, void** communicator, void*) {
  return new_communicator(communicator);
}
int ncclCommGetAsyncError(void*, int* error) {
  *error = kSuccess;
  return kSuccess;
}
int ncclAllReduce(const void*, void*, size_t, int, int, void*, void* stream) {
  return collective(stream, "ncclAllReduce");
}
int ncclReduce(const void*, void*, size_t, int, int, int, void*, void* stream) {
  return collective(stream, "ncclReduce");
}
int ncclReduceScatter(const void*, void*, size_t, int, int, void*, void* stream) {
  return collective(stream, "ncclReduceScatter");
}
int ncclBroadcast(const void*, void*, size_t, int, int, void*, void* stream) {
  return collective(stream, "ncclBroadcast");
}
int ncclAllGather(const void*, void*, size_t, int, void*, void* stream) {
  return collective(stream, "ncclAllGather");
}
int ncclSend(const void*, size_t, int, int, void*, void* stream) {
  return collective(stream, "ncclSend");
}
int ncclRecv(void*, size_t, int, int, void*, void* stream) {
  return collective(stream, "ncclRecv");
}
}
