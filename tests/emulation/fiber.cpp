// SPDX-License-Identifier: Apache-2.0

#include "fiber.h"

#include <cstdint>

#if defined(__x86_64__)
// Saves the registers that a call must preserve on the stack it leaves, and restores them from the
// one it enters.
extern "C" void ems_switch_stack(void** from, void* to);
asm(R"(
.text
.hidden ems_switch_stack
.globl ems_switch_stack
.type ems_switch_stack, @function
ems_switch_stack:
  endbr64
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size ems_switch_stack, .-ems_switch_stack
)");
#endif

namespace ems::emulator {

void Fiber::prepare(void (*entry)()) {
  if (stack_ == nullptr) stack_.reset(new unsigned char[kStackBytes]);
#if defined(__x86_64__)
  const uintptr_t end = reinterpret_cast<uintptr_t>(stack_.get() + kStackBytes) / 16 * 16;
  // From the end: an unused return address of entry(), which puts the stack where a call would, the
  // address to return to, and six registers.
  auto** slots = reinterpret_cast<void**>(end) - 8;
  for (int i = 0; i < 8; ++i) slots[i] = nullptr;
  slots[6] = reinterpret_cast<void*>(entry);
  stack_pointer_ = slots;
#else
  getcontext(&context_);
  context_.uc_stack.ss_sp = stack_.get();
  context_.uc_stack.ss_size = kStackBytes;
  context_.uc_link = nullptr;
  makecontext(&context_, entry, 0);
#endif
}

void Fiber::switch_to(Fiber& next) {
#if defined(__x86_64__)
  ems_switch_stack(&stack_pointer_, next.stack_pointer_);
#else
  swapcontext(&context_, &next.context_);
#endif
}

}  // namespace ems::emulator
