// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <memory>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace ems::emulator {

// A place of execution with a stack of its own. Hand-written for x86-64, where ucontext would make
// a system call per switch, and kernels switch millions of times.
class Fiber {
 public:
  // The thread that runs already; it needs no stack.
  Fiber() = default;

  // Prepares to run entry(), which must never return, at the next switch to this fiber.
  void prepare(void (*entry)());

  // Goes on in `next`; returns when something switches back to this fiber, which must be running.
  void switch_to(Fiber& next);

 private:
  static constexpr size_t kStackBytes = 64 << 10;

  std::unique_ptr<unsigned char[]> stack_;
#if defined(__x86_64__)
  void* stack_pointer_ = nullptr;
#else
  ucontext_t context_;
#endif
};

}  // namespace ems::emulator
