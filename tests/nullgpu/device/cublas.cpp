// SPDX-License-Identifier: Apache-2.0
// Of cuBLAS what has an answer or is a product that torch calls for half and single precision;
// libraries.py adds the rest by name. A product is one launch on its handle's stream.

#include "model.h"

namespace {

struct Handle {
  void* stream = nullptr;
  int mode = 0;
};

constexpr int kSuccess = 0;
constexpr int kExecutionFailed = 13;

int product_of(void* handle, const char* name) {
  nullgpu::Stream& stream = nullgpu::stream_of(static_cast<Handle*>(handle)->stream);
  return nullgpu::submit(stream, {"launch", name, nullptr}) == cudaSuccess ? kSuccess
                                                                           : kExecutionFailed;
}

}  // namespace

extern "C" {

int cublasCreate_v2(void** handle) {
  *handle = new Handle;
  return kSuccess;
}
int cublasDestroy_v2(void* handle) {
  delete static_cast<Handle*>(handle);
  return kSuccess;
}
int cublasSetStream_v2(void* handle, void* stream) {
  static_cast<Handle*>(handle)->stream = stream;
  return kSuccess;
}
int cublasGetVersion_v2(void*, int* version) {
  *version = 130100;
  return kSuccess;
}
int cublasGetPointerMode_v2(void*, int* mode) {
  *mode = 0;
  return kSuccess;
}
int cublasGetMathMode(void*, int* mode) {
  *mode = 0;
  return kSuccess;
}
const char* cublasGetStatusString(int) { return "null"; }
const char* cublasGetStatusName(int) { return "null"; }

int cublasGemmEx(void* handle) { return product_of(handle, "cublasGemmEx"); }
int cublasGemmStridedBatchedEx(void* handle) {
  return product_of(handle, "cublasGemmStridedBatchedEx");
}
int cublasSgemm_v2(void* handle) { return product_of(handle, "cublasSgemm"); }
int cublasSgemmStridedBatched(void* handle) {
  return product_of(handle, "cublasSgemmStridedBatched");
}
int cublasSgemmEx(void* handle) { return product_of(handle, "cublasSgemmEx"); }
int cublasHgemm(void* handle) { return product_of(handle, "cublasHgemm"); }
}
