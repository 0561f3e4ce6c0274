// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cstdint>
#include <type_traits>

#include "ems/numeric.h"
#include "ems/shared_limits.h"
#include "ems/vector.h"

// Everything a kernel asks of the hardware, and the only file that names an intrinsic or an
// instruction. tests/emulation/ has a file of the same name that does the same on a CPU, so that
// the kernels are tested where there is no GPU.

#define EMS_DEVICE __device__ __forceinline__
#define EMS_KERNEL(max_threads, min_ctas) __global__ void __launch_bounds__(max_threads, min_ctas)

namespace ems::device {

constexpr int kWarpSize = 32;
constexpr uint32_t kAllLanes = 0xffffffff;

EMS_DEVICE int thread_index() { return threadIdx.x; }
EMS_DEVICE int64_t cta_x() { return blockIdx.x; }
EMS_DEVICE int64_t cta_y() { return blockIdx.y; }
EMS_DEVICE int64_t cta_z() { return blockIdx.z; }

// All of a CTA's shared memory is one struct, allocated dynamically.
template <typename SHARED, int64_t MAX_BYTES = kSharedBytesAnywhere>
EMS_DEVICE SHARED& shared_memory() {
  static_assert(sizeof(SHARED) <= MAX_BYTES, "more shared memory than a CTA gets");
  extern __shared__ __align__(1024) unsigned char shared_bytes[];
  return *reinterpret_cast<SHARED*>(shared_bytes);
}

EMS_DEVICE void sync_cta() { __syncthreads(); }
EMS_DEVICE void sync_warp() { __syncwarp(); }

template <typename T>
EMS_DEVICE T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(kAllLanes, value, mask);
}
template <typename T>
EMS_DEVICE T shuffle_up(T value, int delta) {
  return __shfl_up_sync(kAllLanes, value, delta);
}
EMS_DEVICE uint32_t ballot(bool value) { return __ballot_sync(kAllLanes, value); }
EMS_DEVICE int count_bits(uint32_t bits) { return __popc(bits); }

EMS_DEVICE void add_shared(int32_t* counter, int32_t value) { atomicAdd(counter, value); }

EMS_DEVICE void min_shared(int32_t* value, int32_t other) { atomicMin(value, other); }
EMS_DEVICE void max_shared(int32_t* value, int32_t other) { atomicMax(value, other); }

EMS_DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

EMS_DEVICE float log2_accurate(float x) { return log2f(x); }

// Copies 16 bytes to shared memory in the background. A size that is known only at run time, for
// zeros where there is nothing to copy, would take twice as many instructions.
EMS_DEVICE void copy_async(void* shared, const void* global) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(global) : "memory");
}
// Copies since the last commit form a group.
EMS_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits for this thread's groups but the latest NUM_PENDING.
template <int NUM_PENDING>
EMS_DEVICE void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(NUM_PENDING) : "memory");
}

// Four 8x8 matrices of 16-bit elements from shared memory. Lane l names row l % 8 of matrix l / 8
// and receives, of each matrix, two elements: row l / 4, columns 2 * (l % 4) and the next.
EMS_DEVICE void load_matrices(uint32_t (&out)[4], const void* shared_row) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared_row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(address)
               : "memory");
}

// The same, each matrix transposed: a lane receives rows 2 * (l % 4) and the next, column l / 4.
EMS_DEVICE void load_matrices_transposed(uint32_t (&out)[4], const void* shared_row) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared_row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(address)
               : "memory");
}

// c += a b of 16x16 times 16x8 on tensor cores, float32 sums; fragments as PTX lays them out.
template <typename T>
EMS_DEVICE void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  static_assert(std::is_same_v<T, BFloat16> || std::is_same_v<T, Float16>);
  if constexpr (std::is_same_v<T, BFloat16>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// Rounds to nearest even; float8 saturates.
template <typename T>
EMS_DEVICE T round_to(float value) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    return {__bfloat16_as_ushort(__float2bfloat16_rn(value))};
  } else if constexpr (std::is_same_v<T, Float16>) {
    return {__half_as_ushort(__float2half_rn(value))};
  } else if constexpr (std::is_same_v<T, Float8E4M3>) {
    return {__nv_cvt_float_to_fp8(value, __NV_SATFINITE, __NV_E4M3)};
  } else {
    return value;
  }
}

template <typename T>
EMS_DEVICE float widen(T value) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    return __uint_as_float(static_cast<uint32_t>(value.bits) << 16);
  } else if constexpr (std::is_same_v<T, Float16>) {
    return __half2float(__ushort_as_half(value.bits));
  } else if constexpr (std::is_same_v<T, Float8E4M3>) {
    return __half2float(__half(__nv_cvt_fp8_to_halfraw(value.bits, __NV_E4M3)));
  } else {
    return value;
  }
}

// 16 values of float8 as the same 16 values of T, half of them in each output.
template <typename T>
EMS_DEVICE void widen_vector(const Vector16& packed, Vector16 (&out)[2]) {
  static_assert(std::is_same_v<T, BFloat16> || std::is_same_v<T, Float16>);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const auto pair = static_cast<__nv_fp8x2_storage_t>(packed.words[i / 2] >> (16 * (i % 2)));
    const __half2_raw halves = __nv_cvt_fp8x2_to_halfraw2(pair, __NV_E4M3);
    if constexpr (std::is_same_v<T, Float16>) {
      out[i / 4].words[i % 4] = static_cast<uint32_t>(halves.y) << 16 | halves.x;
    } else {
      // Every value of float8 is one of bfloat16 too: the lower halves of these floats are 0.
      const float2 floats = __half22float2(__half2(halves));
      out[i / 4].words[i % 4] =
          __byte_perm(__float_as_uint(floats.x), __float_as_uint(floats.y), 0x7632);
    }
  }
}

EMS_DEVICE uint32_t float_bits(float value) { return __float_as_uint(value); }

}  // namespace ems::device
