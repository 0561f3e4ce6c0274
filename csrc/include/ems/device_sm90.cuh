// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <type_traits>

#include "ems/device.cuh"

// What only compute capability 9.0a has: products by groups of four warps that read one operand
// from shared memory, and barriers on which specialised warps wait for each other. Like device.cuh,
// it has a counterpart in tests/emulation/.

// Whether this pass of the compiler makes code for it; elsewhere the kernels only trap.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define EMS_IS_SM90A 1
#else
#define EMS_IS_SM90A 0
#endif

namespace ems::device {

constexpr int kGroupSize = 128;

// Ends the kernel with an error: the work of a kernel for 9.0a in code for other GPUs.
EMS_DEVICE void trap() { __trap(); }

// A barrier in shared memory that completes a phase, alternately 0 and 1, each time `count` threads
// have arrived.
struct Barrier {
  uint64_t state;

  EMS_DEVICE uint32_t address() const {
    return static_cast<uint32_t>(__cvta_generic_to_shared(&state));
  }
  EMS_DEVICE void init(int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address()), "r"(count));
  }
  EMS_DEVICE void arrive() {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address()) : "memory");
  }
  // Returns when the phase with this parity is complete.
  EMS_DEVICE void wait(int parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "wait:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@done bra end;\n"
        "bra wait;\n"
        "end:\n"
        "}\n" ::"r"(address()),
        "r"(parity)
        : "memory");
  }
};

// Makes this thread's writes to shared memory visible to products of groups, which read it by
// another path.
EMS_DEVICE void publish_to_groups() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

EMS_DEVICE void begin_group_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
EMS_DEVICE void commit_group_products() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int NUM_PENDING>
EMS_DEVICE void wait_for_group_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(NUM_PENDING) : "memory");
}

// Keeps the compiler from moving uses of registers that a product in flight writes.
template <int N>
EMS_DEVICE void pin(float (&values)[N][4]) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) asm volatile("" : "+f"(values[i][j])::"memory");
  }
}

// Describes the first 16 columns of a tile [rows][64] of 16-bit elements in shared memory, 128
// bytes a row, whose 16-byte chunks are permuted within eight rows (chunk c of row r stands at c ^
// (r % 8)), and that begins at a multiple of 1024 bytes.
EMS_DEVICE uint64_t describe_columns(const void* tile) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  constexpr uint64_t kEightRows = uint64_t{1024 >> 4} << 32;
  // Not used with this swizzle.
  constexpr uint64_t kLeading = uint64_t{1} << 16;
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(tile));
  return kSwizzle128 | kEightRows | kLeading | (address & 0x3ffff) >> 4;
}
// The same so many bytes further: 32 for the next 16 columns, or as many as another tile is away.
// Of the 64 bits, addresses are in the lower 32 and do not carry.
EMS_DEVICE uint64_t advance_columns(uint64_t columns, int num_bytes) {
  constexpr uint64_t kUpper = uint64_t{0xffffffff} << 32;
  return (columns & kUpper) | (static_cast<uint32_t>(columns) + (num_bytes >> 4));
}

#define EMS_ACC4(c, i) "+f"(c[i][0]), "+f"(c[i][1]), "+f"(c[i][2]), "+f"(c[i][3])
#define EMS_ACC16(c, i) EMS_ACC4(c, i), EMS_ACC4(c, i + 1), EMS_ACC4(c, i + 2), EMS_ACC4(c, i + 3)

#define EMS_GROUP_MULTIPLY_64(TYPE)                                                       \
  asm volatile(                                                                           \
      "{\n"                                                                               \
      ".reg .pred p;\n"                                                                   \
      "setp.ne.b32 p, %37, 0;\n"                                                          \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE                         \
      " "                                                                                 \
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "           \
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, " \
      "{%32, %33, %34, %35}, %36, p, 1, 1, 0;\n"                                          \
      "}\n"                                                                               \
      : EMS_ACC16(c, 0), EMS_ACC16(c, 4)                                                  \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)))

#define EMS_GROUP_MULTIPLY_128(TYPE)                                                      \
  asm volatile(                                                                           \
      "{\n"                                                                               \
      ".reg .pred p;\n"                                                                   \
      "setp.ne.b32 p, %69, 0;\n"                                                          \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPE "." TYPE                        \
      " "                                                                                 \
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "           \
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "  \
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "  \
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, " \
      "{%64, %65, %66, %67}, %68, p, 1, 1, 0;\n"                                          \
      "}\n"                                                                               \
      : EMS_ACC16(c, 0), EMS_ACC16(c, 4), EMS_ACC16(c, 8), EMS_ACC16(c, 12)               \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)))

// c (+)= a b of 64x16 times 16xN, by a group. Each warp gives 16 rows of a, as in multiply_add, and
// receives the products of its rows; b is the transpose of the described rows. Runs until waited
// for.
template <typename T, int N>
EMS_DEVICE void group_multiply(float (&c)[N / 8][4], const uint32_t (&a)[4], uint64_t b,
                               bool accumulate) {
  static_assert(N == 64 || N == 128);
  static_assert(std::is_same_v<T, BFloat16> || std::is_same_v<T, Float16>);
  if constexpr (N == 64 && std::is_same_v<T, BFloat16>) EMS_GROUP_MULTIPLY_64("bf16");
  if constexpr (N == 64 && std::is_same_v<T, Float16>) EMS_GROUP_MULTIPLY_64("f16");
  if constexpr (N == 128 && std::is_same_v<T, BFloat16>) EMS_GROUP_MULTIPLY_128("bf16");
  if constexpr (N == 128 && std::is_same_v<T, Float16>) EMS_GROUP_MULTIPLY_128("f16");
}

#undef EMS_ACC4
#undef EMS_ACC16
#undef EMS_GROUP_MULTIPLY_64
#undef EMS_GROUP_MULTIPLY_128

}  // namespace ems::device
