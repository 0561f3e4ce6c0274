// SPDX-License-Identifier: Apache-2.0
// libcuda: CUDA's driver API over the model. Triton launches through it, vLLM's sleep mode maps
// memory through it.

#include <cuda.h>
#include <dlfcn.h>

#include <cstring>

#include "model.h"

using nullgpu::stream_of;

namespace {

constexpr uintptr_t kFirstContext = 0x3000;

CUresult result(cudaError_t status) { return static_cast<CUresult>(status); }

CUcontext context_of(int device) {
  return reinterpret_cast<CUcontext>(kFirstContext + 16 * static_cast<uintptr_t>(device));
}

nullgpu::Kernel& kernel_of(CUfunction function) {
  return *reinterpret_cast<nullgpu::Kernel*>(function);
}

CUresult launch(CUfunction function, nullgpu::Dims grid, nullgpu::Dims cta, unsigned shared,
                CUstream stream) {
  return result(nullgpu::launch(kernel_of(function), grid, cta, shared, stream_of(stream)));
}

}  // namespace

extern "C" {

// Stands for every function that is not here.
CUresult nullgpu_not_supported() { return CUDA_ERROR_NOT_SUPPORTED; }

// Linking at run time.
CUresult cuLinkCreate_v2(unsigned, CUjit_option*, void**, CUlinkState*) {
  return CUDA_ERROR_NOT_SUPPORTED;
}
CUresult cuLinkAddData_v2(CUlinkState, CUjitInputType, void*, size_t, const char*, unsigned,
                          CUjit_option*, void**) {
  return CUDA_ERROR_NOT_SUPPORTED;
}
CUresult cuLinkComplete(CUlinkState, void**, size_t*) { return CUDA_ERROR_NOT_SUPPORTED; }

// -- devices and contexts ------------------------------------------------------------------------

CUresult cuInit(unsigned) { return CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int* version) {
  *version = CUDA_VERSION;
  return CUDA_SUCCESS;
}
CUresult cuDeviceGet(CUdevice* device, int ordinal) {
  *device = ordinal;
  return ordinal < nullgpu::num_devices() ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE;
}
CUresult cuDeviceGetCount(int* count) {
  *count = nullgpu::num_devices();
  return CUDA_SUCCESS;
}
CUresult cuDeviceGetName(char* name, int size, CUdevice) {
  std::strncpy(name, nullgpu::kName, size);
  return CUDA_SUCCESS;
}
CUresult cuDeviceGetUuid_v2(CUuuid* uuid, CUdevice device) {
  std::memset(uuid, 0, sizeof *uuid);
  uuid->bytes[15] = static_cast<char>(device);
  return CUDA_SUCCESS;
}
CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute number, CUdevice) {
  *value = nullgpu::attribute(number);
  return CUDA_SUCCESS;
}
CUresult cuCtxGetCurrent(CUcontext* context) {
  *context = context_of(nullgpu::current_device());
  return CUDA_SUCCESS;
}
CUresult cuCtxSetCurrent(CUcontext context) {
  const uintptr_t value = reinterpret_cast<uintptr_t>(context);
  if (value < kFirstContext) return CUDA_SUCCESS;
  return result(nullgpu::set_device(static_cast<int>((value - kFirstContext) / 16)));
}
CUresult cuCtxGetDevice(CUdevice* device) {
  *device = nullgpu::current_device();
  return CUDA_SUCCESS;
}
CUresult cuCtxPushCurrent_v2(CUcontext context) { return cuCtxSetCurrent(context); }
CUresult cuCtxPopCurrent_v2(CUcontext* context) { return cuCtxGetCurrent(context); }
CUresult cuCtxGetLimit(size_t* value, CUlimit) {
  *value = size_t{8} << 20;
  return CUDA_SUCCESS;
}
CUresult cuCtxSetLimit(CUlimit, size_t) { return CUDA_SUCCESS; }
CUresult cuCtxSynchronize() { return result(nullgpu::synchronize("cuCtxSynchronize", nullptr)); }
CUresult cuStreamSynchronize(CUstream stream) {
  return result(nullgpu::synchronize("cuStreamSynchronize", &stream_of(stream)));
}
CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  *context = context_of(device);
  return CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxRelease_v2(CUdevice) { return CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxGetState(CUdevice, unsigned* flags, int* active) {
  *flags = 0;
  *active = 1;
  return CUDA_SUCCESS;
}
CUresult cuGetErrorString(CUresult, const char** text) {
  *text = "an error of the null GPU";
  return CUDA_SUCCESS;
}
CUresult cuGetErrorName(CUresult error, const char** text) { return cuGetErrorString(error, text); }
CUresult cuGetProcAddress_v2(const char* name, void** function, int, cuuint64_t,
                             CUdriverProcAddressQueryResult* found) {
  *function = dlsym(RTLD_DEFAULT, name);
  if (*function == nullptr) *function = reinterpret_cast<void*>(&nullgpu_not_supported);
  if (found != nullptr) *found = CU_GET_PROC_ADDRESS_SUCCESS;
  return CUDA_SUCCESS;
}

// -- modules and kernels -------------------------------------------------------------------------

CUresult cuModuleLoadData(CUmodule* module, const void*) {
  *module = reinterpret_cast<CUmodule>(0x4000);
  return CUDA_SUCCESS;
}
CUresult cuModuleLoad(CUmodule* module, const char*) { return cuModuleLoadData(module, nullptr); }
CUresult cuModuleLoadDataEx(CUmodule* module, const void* image, unsigned, CUjit_option*, void**) {
  return cuModuleLoadData(module, image);
}
CUresult cuModuleUnload(CUmodule) { return CUDA_SUCCESS; }
CUresult cuModuleGetFunction(CUfunction* function, CUmodule, const char* name) {
  // For ever, as a module is.
  *function = reinterpret_cast<CUfunction>(new nullgpu::Kernel{name});
  return CUDA_SUCCESS;
}
CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction) {
  *value = attribute == CU_FUNC_ATTRIBUTE_NUM_REGS                ? 32
           : attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024
                                                                  : 0;
  return CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
  if (attribute != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) return CUDA_SUCCESS;
  return result(nullgpu::allow_shared_bytes(kernel_of(function), value));
}
CUresult cuFuncSetCacheConfig(CUfunction, CUfunc_cache) { return CUDA_SUCCESS; }
CUresult cuOccupancyMaxActiveClusters(int* count, CUfunction, const CUlaunchConfig*) {
  *count = 66;
  return CUDA_SUCCESS;
}
CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int* count, CUfunction, int, size_t) {
  *count = 2;
  return CUDA_SUCCESS;
}
CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction function, void**, void**) {
  return launch(function, {config->gridDimX, config->gridDimY, config->gridDimZ},
                {config->blockDimX, config->blockDimY, config->blockDimZ}, config->sharedMemBytes,
                config->hStream);
}
CUresult cuLaunchKernel(CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                        unsigned cta_x, unsigned cta_y, unsigned cta_z, unsigned shared,
                        CUstream stream, void**, void**) {
  return launch(function, {grid_x, grid_y, grid_z}, {cta_x, cta_y, cta_z}, shared, stream);
}
CUresult cuLaunchCooperativeKernel(CUfunction function, unsigned grid_x, unsigned grid_y,
                                   unsigned grid_z, unsigned cta_x, unsigned cta_y, unsigned cta_z,
                                   unsigned shared, CUstream stream, void**) {
  return launch(function, {grid_x, grid_y, grid_z}, {cta_x, cta_y, cta_z}, shared, stream);
}
CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType, cuuint32_t, void*,
                                const cuuint64_t*, const cuuint64_t*, const cuuint32_t*,
                                const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                                CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  std::memset(map, 0, sizeof *map);
  return CUDA_SUCCESS;
}

// -- memory --------------------------------------------------------------------------------------

CUresult cuPointerGetAttribute(void* value, CUpointer_attribute attribute, CUdeviceptr pointer) {
  const nullgpu::Place place = nullgpu::place_of(reinterpret_cast<void*>(pointer));
  switch (attribute) {
    case CU_POINTER_ATTRIBUTE_DEVICE_POINTER:
      *static_cast<CUdeviceptr*>(value) = pointer;
      break;
    case CU_POINTER_ATTRIBUTE_MEMORY_TYPE:
      *static_cast<unsigned*>(value) =
          place.memory == nullgpu::Memory::kDevice ? CU_MEMORYTYPE_DEVICE : CU_MEMORYTYPE_HOST;
      break;
    case CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL:
      *static_cast<int*>(value) = place.device;
      break;
    default:
      *static_cast<unsigned*>(value) = 0;
  }
  return CUDA_SUCCESS;
}
CUresult cuPointerGetAttributes(unsigned count, CUpointer_attribute* attributes, void** values,
                                CUdeviceptr pointer) {
  for (unsigned i = 0; i < count; ++i) cuPointerGetAttribute(values[i], attributes[i], pointer);
  return CUDA_SUCCESS;
}
CUresult cuMemGetAllocationGranularity(size_t* size, const CUmemAllocationProp*,
                                       CUmemAllocationGranularity_flags) {
  *size = size_t{2} << 20;
  return CUDA_SUCCESS;
}
CUresult cuMemAddressReserve(CUdeviceptr* pointer, size_t size, size_t, CUdeviceptr,
                             unsigned long long) {
  *pointer = reinterpret_cast<CUdeviceptr>(nullgpu::reserve(size));
  return *pointer == 0 ? CUDA_ERROR_OUT_OF_MEMORY : CUDA_SUCCESS;
}
CUresult cuMemAddressFree(CUdeviceptr pointer, size_t size) {
  nullgpu::unreserve(reinterpret_cast<void*>(pointer), size);
  return CUDA_SUCCESS;
}
// The handle is the size: contents live where they are mapped.
CUresult cuMemCreate(CUmemGenericAllocationHandle* handle, size_t size, const CUmemAllocationProp*,
                     unsigned long long) {
  if (!nullgpu::take_bytes(size)) return CUDA_ERROR_OUT_OF_MEMORY;
  nullgpu::note("allocate", "eager", "cuMemCreate", nullptr);
  *handle = size;
  return CUDA_SUCCESS;
}
CUresult cuMemRelease(CUmemGenericAllocationHandle handle) {
  nullgpu::give_bytes(handle);
  return CUDA_SUCCESS;
}
CUresult cuMemMap(CUdeviceptr pointer, size_t size, size_t, CUmemGenericAllocationHandle,
                  unsigned long long) {
  nullgpu::map(reinterpret_cast<void*>(pointer), size);
  return CUDA_SUCCESS;
}
CUresult cuMemUnmap(CUdeviceptr pointer, size_t size) {
  nullgpu::unmap(reinterpret_cast<void*>(pointer), size);
  return CUDA_SUCCESS;
}
CUresult cuMemSetAccess(CUdeviceptr, size_t, const CUmemAccessDesc*, size_t) {
  return CUDA_SUCCESS;
}
}
