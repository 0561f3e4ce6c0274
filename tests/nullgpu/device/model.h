// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <driver_types.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

// A GPU without arithmetic. Memory is the host's, copies are made, streams and events are kept,
// captures follow CUDA's rules and give graphs whose copies are made again when they are launched.
// Kernels are noted and do nothing. The libraries of CUDA beside this are adapters to it.
//
// Environment: NULLGPU_COUNT GPUs (1), NULLGPU_CAPABILITY 10 * major + minor (90).
namespace nullgpu {

// -- the devices ---------------------------------------------------------------------------------

struct Properties {
  int major, minor;
  int64_t shared_bytes_per_cta;  // at most, after opting in
  int64_t shared_bytes_per_multiprocessor;
};

inline constexpr const char* kName = "NULL GPU as H100";
inline constexpr size_t kMemoryBytes = size_t{80} << 30;
// What a driver takes for itself.
inline constexpr size_t kReservedBytes = size_t{1} << 29;
inline constexpr int64_t kDefaultSharedBytes = 48 << 10;

// Those in the machine, and of them those that CUDA_VISIBLE_DEVICES lets a program see.
int num_physical_devices();
int num_devices();
int current_device();
cudaError_t set_device(int device);
const Properties& properties();
// The answer to cudaDeviceGetAttribute and to cuDeviceGetAttribute, whose numbers are the same.
int attribute(int number);

// -- memory --------------------------------------------------------------------------------------

enum class Memory { kPageable, kPinned, kDevice };

struct Place {
  Memory memory = Memory::kPageable;
  int device = -1;
  char* begin = nullptr;
  size_t num_bytes = 0;
};

// Null when there is no more.
void* allocate(size_t num_bytes, Memory memory);
bool release(void* pointer);
Place place_of(const void* pointer);
size_t free_bytes();
// Memory that is mapped by hand: an address range without memory, then memory in it.
void* reserve(size_t num_bytes);
void unreserve(void* pointer, size_t num_bytes);
void map(void* pointer, size_t num_bytes);
void unmap(void* pointer, size_t num_bytes);
bool take_bytes(size_t num_bytes);
void give_bytes(size_t num_bytes);

// -- streams, events and graphs ------------------------------------------------------------------

struct Capture;

struct Stream {
  int id;
  int device;
  Capture* capture = nullptr;
};

struct Event {
  // Where it was recorded, and the capture that was under way there.
  Stream* stream = nullptr;
  Capture* capture = nullptr;
};

// Something that a stream does.
struct Work {
  const char* kind;  // launch, copy, set, host
  std::string name;
  std::function<void()> run;
};

struct Graph {
  int id;
  std::vector<Work> nodes;
};

// The stream behind a handle; the default ones are the current device's.
Stream& stream_of(void* handle);
void* create_stream();
cudaError_t destroy_stream(void* handle);

cudaError_t record_event(Event& event, Stream& stream);
cudaError_t wait_event(Stream& stream, const Event& event);

cudaError_t begin_capture(Stream& stream, cudaStreamCaptureMode mode);
cudaError_t end_capture(Stream& stream, Graph** graph);
cudaStreamCaptureStatus capture_status(const Stream& stream, unsigned long long* id);
cudaStreamCaptureMode exchange_mode(cudaStreamCaptureMode mode);
// An error while a capture forbids what CUDA calls potentially unsafe, as an allocation.
cudaError_t check_unsafe(const char* what);
// An error when a stream (null: all of them) cannot be waited for, because it is being captured.
cudaError_t synchronize(const char* what, Stream* stream);

// Does the work now, or puts it into the graph that is being captured.
cudaError_t submit(Stream& stream, Work work);
cudaError_t launch_graph(const Graph& graph, Stream& stream);

// -- kernels -------------------------------------------------------------------------------------

struct Kernel {
  std::string name;
  int64_t max_shared_bytes = kDefaultSharedBytes;
};

struct Dims {
  unsigned x = 1, y = 1, z = 1;
};

// The kernel behind the address of a host function.
Kernel& kernel_of(const void* function);
void register_kernel(const void* function, const char* mangled);
cudaError_t allow_shared_bytes(Kernel& kernel, int64_t num_bytes);
// Notes a launch, after the checks that a driver makes of it.
cudaError_t launch(const Kernel& kernel, Dims grid, Dims cta, int64_t shared_bytes, Stream& stream);

// -- what happened -------------------------------------------------------------------------------

// Notes an event if somebody is listening. `how` is one of: eager, captured, replayed, beside
// (done at once while this thread captures another stream), refused.
void note(const char* kind, const char* how, const std::string& name, const Stream* stream);
cudaError_t refuse(const char* what, cudaError_t error, const Stream* stream = nullptr);

}  // namespace nullgpu
