// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <utility>
#include <vector>

// Runs CUDA kernels on a CPU, to test them where there is no GPU: one CTA after the other, every
// CUDA thread a fiber. It checks what the kernels compute, that they meet at the same barriers, and
// through random scheduling that they need no order but the barriers'. It does not model time,
// memory consistency, or what a GPU forbids; those are for a GPU.
namespace ems::emulator {

constexpr int kWarpSize = 32;

struct Warp {
  uint64_t exchange[kWarpSize];
  uint32_t left[kWarpSize][4];
  uint32_t right[kWarpSize][2];
  int num_waiting = 0;
};

struct Copy {
  void* to;
  const void* from;  // nullptr: zeros
};

// A product of a group of warps that has not been waited for.
struct GroupProduct {
  float (*sums)[4];
  uint32_t left[4];
  uint64_t right;
  bool accumulate;
  void (*run)(GroupProduct&);
};

struct Thread {
  int index = 0;
  std::vector<GroupProduct> products;
  std::deque<std::vector<GroupProduct>> product_groups;
  std::vector<Copy> copies;
  std::deque<std::vector<Copy>> groups;
};

struct alignas(1024) SharedLine {
  unsigned char bytes[1024];
};

struct SharedMemory {
  std::vector<SharedLine> lines;
  size_t num_bytes = 0;

  size_t size() const { return num_bytes; }
  unsigned char* data() { return lines.empty() ? nullptr : lines.front().bytes; }
};

struct Cta {
  int64_t x, y, z;
  SharedMemory shared;
};

// Of the fiber that runs.
Thread& thread();
Warp& warp();
Cta& cta();

void sync_cta();
void sync_warp();
// Lets another thread run, for one that waits in a loop.
void give_way();

// Throws when a kernel does what a GPU would not forgive.
void require(bool condition, const char* what);

// 10 * major + minor of the GPU that is emulated, from EMS_EMULATED_CAPABILITY. 89 without it: the
// kernels are those of 80, and no GPU that runs them gives a CTA less shared memory.
int compute_capability();

// What that GPU gives a CTA at most; the table is in emulator.cpp. Throws for a GPU not in it.
int64_t max_shared_bytes();

// Runs `body` once per thread of every CTA.
void run(const char* name, int64_t x, int64_t y, int64_t z, int num_threads, int64_t shared_bytes,
         const std::function<void()>& body);

}  // namespace ems::emulator
