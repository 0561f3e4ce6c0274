// SPDX-License-Identifier: Apache-2.0
// libcudart: CUDA's runtime API over the model.

#include <cuda_runtime_api.h>
#include <dlfcn.h>

#include <cstdio>
#include <cstring>

#include "model.h"

using nullgpu::Memory;
using nullgpu::stream_of;

namespace {

thread_local cudaError_t last_error = cudaSuccess;

cudaError_t done(cudaError_t status) {
  if (status != cudaSuccess) last_error = status;
  return status;
}

cudaError_t allocate(const char* what, void** pointer, size_t num_bytes, Memory memory) {
  const cudaError_t status = nullgpu::check_unsafe(what);
  if (status != cudaSuccess) return done(status);
  nullgpu::note("allocate", "eager", what, nullptr);
  *pointer = nullgpu::allocate(num_bytes, memory);
  return done(*pointer == nullptr ? cudaErrorMemoryAllocation : cudaSuccess);
}

cudaError_t release(const char* what, void* pointer) {
  const cudaError_t status = nullgpu::check_unsafe(what);
  if (status != cudaSuccess) return done(status);
  nullgpu::note("free", "eager", what, nullptr);
  return done(nullgpu::release(pointer) ? cudaSuccess : cudaErrorInvalidValue);
}

const char* name_of(Memory memory) {
  switch (memory) {
    case Memory::kDevice:
      return "device";
    case Memory::kPinned:
      return "pinned";
    case Memory::kPageable:
      return "pageable";
  }
  return "";
}

// "pageable to device" and so on.
std::string route(const void* target, const void* source) {
  return std::string(name_of(nullgpu::place_of(source).memory)) + " to " +
         name_of(nullgpu::place_of(target).memory);
}

cudaError_t copy(void* target, const void* source, size_t num_bytes, cudaStream_t stream) {
  return done(nullgpu::submit(stream_of(stream), {"copy", route(target, source), [=] {
                                                    std::memmove(target, source, num_bytes);
                                                  }}));
}

// A large pool that is filled with zeros has never been written: it need not cost memory.
constexpr size_t kLargeBytes = size_t{64} << 20;

cudaError_t set(void* target, int value, size_t num_bytes, cudaStream_t stream) {
  return done(nullgpu::submit(stream_of(stream), {"set", "memory", [=] {
                                                    if (value == 0 && num_bytes >= kLargeBytes) {
                                                      return;
                                                    }
                                                    std::memset(target, value, num_bytes);
                                                  }}));
}

cudaError_t launch_host(cudaStream_t stream, std::function<void()> call) {
  return done(nullgpu::submit(stream_of(stream), {"host", "function", std::move(call)}));
}

nullgpu::Dims dims(dim3 from) { return {from.x, from.y, from.z}; }

cudaError_t launch(const void* function, dim3 grid, dim3 cta, size_t shared, cudaStream_t stream) {
  return done(nullgpu::launch(nullgpu::kernel_of(function), dims(grid), dims(cta), shared,
                              stream_of(stream)));
}

// What <<<>>> leaves for the stub of the kernel that is called next.
thread_local struct {
  dim3 grid, cta;
  size_t shared;
  cudaStream_t stream;
} configuration;

}  // namespace

extern "C" {

// -- devices and errors --------------------------------------------------------------------------

cudaError_t cudaGetDeviceCount(int* count) {
  *count = nullgpu::num_devices();
  return done(*count == 0 ? cudaErrorNoDevice : cudaSuccess);
}
cudaError_t cudaGetDevice(int* device) {
  *device = nullgpu::current_device();
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) { return done(nullgpu::set_device(device)); }
cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int* version) { return cudaDriverGetVersion(version); }
cudaError_t cudaDeviceGetAttribute(int* value, enum cudaDeviceAttr number, int device) {
  *value = nullgpu::attribute(number);
  return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp* found, int device) {
  std::memset(found, 0, sizeof *found);
  std::strcpy(found->name, nullgpu::kName);
  // Tells the devices apart.
  found->uuid.bytes[15] = static_cast<char>(device);
  found->pciBusID = device + 1;
  found->major = nullgpu::properties().major;
  found->minor = nullgpu::properties().minor;
  found->totalGlobalMem = nullgpu::kMemoryBytes;
  found->totalConstMem = 65536;
  found->sharedMemPerBlock = nullgpu::kDefaultSharedBytes;
  found->sharedMemPerBlockOptin = nullgpu::properties().shared_bytes_per_cta;
  found->sharedMemPerMultiprocessor = nullgpu::properties().shared_bytes_per_multiprocessor;
  found->regsPerBlock = found->regsPerMultiprocessor = 65536;
  found->warpSize = 32;
  found->maxThreadsPerBlock = found->maxThreadsDim[0] = found->maxThreadsDim[1] = 1024;
  found->maxThreadsDim[2] = 64;
  found->maxGridSize[0] = 2147483647;
  found->maxGridSize[1] = found->maxGridSize[2] = 65535;
  found->maxThreadsPerMultiProcessor = 2048;
  found->maxBlocksPerMultiProcessor = 32;
  found->multiProcessorCount = nullgpu::attribute(cudaDevAttrMultiProcessorCount);
  found->l2CacheSize = nullgpu::attribute(cudaDevAttrL2CacheSize);
  found->memoryBusWidth = nullgpu::attribute(cudaDevAttrGlobalMemoryBusWidth);
  found->asyncEngineCount = 3;
  found->concurrentKernels = found->unifiedAddressing = 1;
  found->cooperativeLaunch = 1;
  return cudaSuccess;
}
cudaError_t cudaDeviceCanAccessPeer(int* can, int device, int peer) {
  *can = 0;
  return cudaSuccess;
}
cudaError_t cudaDeviceEnablePeerAccess(int peer, unsigned flags) {
  return done(cudaErrorPeerAccessUnsupported);
}
cudaError_t cudaDeviceGetPCIBusId(char* text, int size, int device) {
  std::snprintf(text, size, "0000:%02x:00.0", device + 1);
  return cudaSuccess;
}
cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  *least = 0;
  *greatest = -5;
  return cudaSuccess;
}
cudaError_t cudaDeviceSynchronize(void) {
  return done(nullgpu::synchronize("cudaDeviceSynchronize", nullptr));
}
cudaError_t cudaDeviceReset(void) { return cudaSuccess; }
cudaError_t cudaGetLastError(void) {
  const cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}
cudaError_t cudaPeekAtLastError(void) { return last_error; }
const char* cudaGetErrorName(cudaError_t error) {
  thread_local char text[64];
  std::snprintf(text, sizeof text, "error %d of the null GPU", static_cast<int>(error));
  return text;
}
const char* cudaGetErrorString(cudaError_t error) { return cudaGetErrorName(error); }

// -- memory --------------------------------------------------------------------------------------

cudaError_t cudaMalloc(void** pointer, size_t num_bytes) {
  return allocate("cudaMalloc", pointer, num_bytes, Memory::kDevice);
}
cudaError_t cudaMallocAsync(void** pointer, size_t num_bytes, cudaStream_t stream) {
  return allocate("cudaMallocAsync", pointer, num_bytes, Memory::kDevice);
}
cudaError_t cudaHostAlloc(void** pointer, size_t num_bytes, unsigned flags) {
  return allocate("cudaHostAlloc", pointer, num_bytes, Memory::kPinned);
}
cudaError_t cudaMallocHost(void** pointer, size_t num_bytes) {
  return allocate("cudaMallocHost", pointer, num_bytes, Memory::kPinned);
}
cudaError_t cudaFree(void* pointer) { return release("cudaFree", pointer); }
cudaError_t cudaFreeAsync(void* pointer, cudaStream_t) { return release("cudaFreeAsync", pointer); }
cudaError_t cudaFreeHost(void* pointer) { return release("cudaFreeHost", pointer); }
cudaError_t cudaHostRegister(void*, size_t, unsigned) { return cudaSuccess; }
cudaError_t cudaHostUnregister(void*) { return cudaSuccess; }
cudaError_t cudaHostGetDevicePointer(void** device, void* host, unsigned) {
  *device = host;
  return cudaSuccess;
}
cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  *free = nullgpu::free_bytes();
  *total = nullgpu::kMemoryBytes;
  return cudaSuccess;
}
cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes* found, const void* pointer) {
  const nullgpu::Place place = nullgpu::place_of(pointer);
  std::memset(found, 0, sizeof *found);
  found->type = cudaMemoryTypeUnregistered;
  found->device = place.device;
  if (place.memory != Memory::kPageable) {
    found->type = place.memory == Memory::kDevice ? cudaMemoryTypeDevice : cudaMemoryTypeHost;
    found->devicePointer = const_cast<void*>(pointer);
    found->hostPointer = place.memory == Memory::kPinned ? found->devicePointer : nullptr;
  }
  return cudaSuccess;
}
cudaError_t cudaMemcpy(void* target, const void* source, size_t num_bytes, enum cudaMemcpyKind) {
  const cudaError_t status = nullgpu::check_unsafe("cudaMemcpy");
  if (status != cudaSuccess) return done(status);
  nullgpu::note("synchronize", "eager", "cudaMemcpy", nullptr);
  return copy(target, source, num_bytes, nullptr);
}
cudaError_t cudaMemcpyAsync(void* target, const void* source, size_t num_bytes, enum cudaMemcpyKind,
                            cudaStream_t stream) {
  return copy(target, source, num_bytes, stream);
}
cudaError_t cudaMemcpyPeerAsync(void* target, int, const void* source, int, size_t num_bytes,
                                cudaStream_t stream) {
  return copy(target, source, num_bytes, stream);
}
cudaError_t cudaMemcpy2DAsync(void* target, size_t target_pitch, const void* source,
                              size_t source_pitch, size_t width, size_t height, enum cudaMemcpyKind,
                              cudaStream_t stream) {
  return done(nullgpu::submit(stream_of(stream),
                              {"copy", route(target, source), [=] {
                                 for (size_t i = 0; i < height; ++i) {
                                   std::memmove(static_cast<char*>(target) + i * target_pitch,
                                                static_cast<const char*>(source) + i * source_pitch,
                                                width);
                                 }
                               }}));
}
// Variables of a kernel have no memory of their own.
cudaError_t cudaMemcpyToSymbol(const void*, const void*, size_t, size_t, enum cudaMemcpyKind) {
  return cudaSuccess;
}
cudaError_t cudaGetSymbolAddress(void** pointer, const void*) {
  static char room[1 << 16];
  *pointer = room;
  return cudaSuccess;
}
cudaError_t cudaMemset(void* target, int value, size_t num_bytes) {
  return set(target, value, num_bytes, nullptr);
}
cudaError_t cudaMemsetAsync(void* target, int value, size_t num_bytes, cudaStream_t stream) {
  return set(target, value, num_bytes, stream);
}
cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t* pool, int) {
  static char one;
  *pool = reinterpret_cast<cudaMemPool_t>(&one);
  return cudaSuccess;
}
cudaError_t cudaMemPoolGetAttribute(cudaMemPool_t, enum cudaMemPoolAttr, void* value) {
  *static_cast<uint64_t*>(value) = 0;
  return cudaSuccess;
}
cudaError_t cudaMemPoolSetAccess(cudaMemPool_t, const struct cudaMemAccessDesc*, size_t) {
  return cudaSuccess;
}
cudaError_t cudaMemPoolSetAttribute(cudaMemPool_t, enum cudaMemPoolAttr, void*) {
  return cudaSuccess;
}
cudaError_t cudaMemPoolTrimTo(cudaMemPool_t, size_t) { return cudaSuccess; }
// Processes do not see each other's memory.
cudaError_t cudaIpcGetMemHandle(cudaIpcMemHandle_t*, void*) { return done(cudaErrorNotSupported); }
cudaError_t cudaIpcOpenMemHandle(void**, cudaIpcMemHandle_t, unsigned) {
  return done(cudaErrorNotSupported);
}
cudaError_t cudaIpcCloseMemHandle(void*) { return done(cudaErrorNotSupported); }
cudaError_t cudaIpcGetEventHandle(cudaIpcEventHandle_t*, cudaEvent_t) {
  return done(cudaErrorNotSupported);
}
cudaError_t cudaIpcOpenEventHandle(cudaEvent_t*, cudaIpcEventHandle_t) {
  return done(cudaErrorNotSupported);
}

// -- streams and events --------------------------------------------------------------------------

cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned, int) {
  *stream = static_cast<cudaStream_t>(nullgpu::create_stream());
  return cudaSuccess;
}
cudaError_t cudaStreamCreate(cudaStream_t* stream) {
  return cudaStreamCreateWithPriority(stream, 0, 0);
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
  return cudaStreamCreateWithPriority(stream, flags, 0);
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) { return done(nullgpu::destroy_stream(stream)); }
cudaError_t cudaStreamGetPriority(cudaStream_t, int* priority) {
  *priority = 0;
  return cudaSuccess;
}
cudaError_t cudaStreamQuery(cudaStream_t stream) {
  return done(nullgpu::synchronize("cudaStreamQuery", &stream_of(stream)));
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  return done(nullgpu::synchronize("cudaStreamSynchronize", &stream_of(stream)));
}
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  return done(nullgpu::wait_event(stream_of(stream), *reinterpret_cast<nullgpu::Event*>(event)));
}
cudaError_t cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t call, void* data,
                                  unsigned) {
  return launch_host(stream, [=] { call(stream, cudaSuccess, data); });
}
cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t call, void* data) {
  return launch_host(stream, [=] { call(data); });
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  *event = reinterpret_cast<cudaEvent_t>(new nullgpu::Event);
  return cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, 0); }
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete reinterpret_cast<nullgpu::Event*>(event);
  return cudaSuccess;
}
cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned) {
  return done(nullgpu::record_event(*reinterpret_cast<nullgpu::Event*>(event), stream_of(stream)));
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  return cudaEventRecordWithFlags(event, stream, 0);
}
cudaError_t cudaEventQuery(cudaEvent_t) { return done(nullgpu::check_unsafe("cudaEventQuery")); }
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  const nullgpu::Event& recorded = *reinterpret_cast<nullgpu::Event*>(event);
  if (recorded.capture != nullptr) {
    return done(nullgpu::synchronize("cudaEventSynchronize", recorded.stream));
  }
  nullgpu::note("synchronize", "eager", "cudaEventSynchronize", nullptr);
  return cudaSuccess;
}
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t, cudaEvent_t) {
  *milliseconds = 1.0f;
  return cudaSuccess;
}

// -- graphs --------------------------------------------------------------------------------------

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, enum cudaStreamCaptureMode mode) {
  return done(nullgpu::begin_capture(stream_of(stream), mode));
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  return done(nullgpu::end_capture(stream_of(stream), reinterpret_cast<nullgpu::Graph**>(graph)));
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus* status) {
  *status = nullgpu::capture_status(stream_of(stream), nullptr);
  return cudaSuccess;
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, enum cudaStreamCaptureStatus* status,
                                     unsigned long long* id, cudaGraph_t* graph,
                                     const cudaGraphNode_t** dependencies,
                                     const cudaGraphEdgeData** edges, size_t* num_dependencies) {
  *status = nullgpu::capture_status(stream_of(stream), id);
  if (graph != nullptr) *graph = nullptr;
  if (dependencies != nullptr) *dependencies = nullptr;
  if (edges != nullptr) *edges = nullptr;
  if (num_dependencies != nullptr) *num_dependencies = 0;
  return cudaSuccess;
}
cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode* mode) {
  *mode = nullgpu::exchange_mode(*mode);
  return cudaSuccess;
}
cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t*, size_t* count) {
  *count = reinterpret_cast<nullgpu::Graph*>(graph)->nodes.size();
  return cudaSuccess;
}
cudaError_t cudaGraphNodeGetDependencies(cudaGraphNode_t, cudaGraphNode_t*, cudaGraphEdgeData*,
                                         size_t* count) {
  *count = 0;
  return cudaSuccess;
}
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* exec, cudaGraph_t graph,
                                          unsigned long long) {
  *exec = reinterpret_cast<cudaGraphExec_t>(
      new nullgpu::Graph(*reinterpret_cast<nullgpu::Graph*>(graph)));
  return cudaSuccess;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* exec, cudaGraph_t graph,
                                 unsigned long long flags) {
  return cudaGraphInstantiateWithFlags(exec, graph, flags);
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream) {
  return done(nullgpu::launch_graph(*reinterpret_cast<nullgpu::Graph*>(exec), stream_of(stream)));
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete reinterpret_cast<nullgpu::Graph*>(graph);
  return cudaSuccess;
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) {
  delete reinterpret_cast<nullgpu::Graph*>(exec);
  return cudaSuccess;
}
cudaError_t cudaGraphDebugDotPrint(cudaGraph_t, const char*, unsigned) { return cudaSuccess; }

// -- kernels -------------------------------------------------------------------------------------

cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes* found, const void* function) {
  std::memset(found, 0, sizeof *found);
  found->maxThreadsPerBlock = 1024;
  found->numRegs = 32;
  found->binaryVersion = found->ptxVersion =
      10 * nullgpu::properties().major + nullgpu::properties().minor;
  found->maxDynamicSharedSizeBytes = nullgpu::kernel_of(function).max_shared_bytes;
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void* function, enum cudaFuncAttribute attribute,
                                 int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  return done(nullgpu::allow_shared_bytes(nullgpu::kernel_of(function), value));
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* count, const void*, int,
                                                                   size_t, unsigned) {
  *count = 2;
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* count, const void*, int, size_t) {
  *count = 2;
  return cudaSuccess;
}
cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3 cta, void**, size_t shared,
                             cudaStream_t stream) {
  return launch(function, grid, cta, shared, stream);
}
cudaError_t cudaLaunchCooperativeKernel(const void* function, dim3 grid, dim3 cta, void**,
                                        size_t shared, cudaStream_t stream) {
  return launch(function, grid, cta, shared, stream);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function, void**) {
  return launch(function, config->gridDim, config->blockDim, config->dynamicSmemBytes,
                config->stream);
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 cta, void**, size_t shared,
                               cudaStream_t stream) {
  return launch(kernel, grid, cta, shared, stream);
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  *kernel = static_cast<cudaKernel_t>(const_cast<void*>(function));
  return cudaSuccess;
}
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 cta, size_t shared, cudaStream_t stream) {
  configuration = {grid, cta, shared, stream};
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* cta, size_t* shared, void* stream) {
  *grid = configuration.grid;
  *cta = configuration.cta;
  *shared = configuration.shared;
  *static_cast<cudaStream_t*>(stream) = configuration.stream;
  return cudaSuccess;
}
void** __cudaRegisterFatBinary(void*) {
  static void* handle[1];
  return handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* function, char*, const char* name, int, void*,
                            void*, void*, void*, int*) {
  nullgpu::register_kernel(function, name);
}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
char __cudaInitModule(void**) { return 1; }

// -- the rest ------------------------------------------------------------------------------------

cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned,
                                             unsigned long long,
                                             enum cudaDriverEntryPointQueryResult* result) {
  void* driver = dlopen("libcuda.so.1", RTLD_NOW);
  *function = driver == nullptr ? nullptr : dlsym(driver, name);
  if (*function == nullptr && driver != nullptr) *function = dlsym(driver, "nullgpu_not_supported");
  if (result != nullptr) *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
cudaError_t cudaProfilerStart(void) { return cudaSuccess; }
cudaError_t cudaProfilerStop(void) { return cudaSuccess; }
}
