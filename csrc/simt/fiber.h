// A stack that can be entered and left. On x86-64 a switch is fifteen instructions; elsewhere
// ucontext is used, which makes two system calls for the signal mask.
#pragma once

#include <cstddef>
#include <cstdint>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace simt {

#if defined(__x86_64__)

struct Context {
  void* stack_pointer = nullptr;
};

extern "C" void simt_switch(void** save_stack_pointer, void* load_stack_pointer);

inline void prepare(Context* context, void* stack, size_t size, void (*entry)()) {
  auto top = (reinterpret_cast<uintptr_t>(stack) + size) & ~uintptr_t{15};
  auto** slot = reinterpret_cast<void**>(top);
  *--slot = nullptr;  // keeps the stack aligned as after a call, and ends a debugger's walk
  *--slot = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--slot = nullptr;
  context->stack_pointer = slot;
}

inline void switch_context(Context* from, Context* to) {
  simt_switch(&from->stack_pointer, to->stack_pointer);
}

#else

struct Context {
  ucontext_t context;
};

inline void prepare(Context* context, void* stack, size_t size, void (*entry)()) {
  getcontext(&context->context);
  context->context.uc_stack.ss_sp = stack;
  context->context.uc_stack.ss_size = size;
  context->context.uc_link = nullptr;
  makecontext(&context->context, entry, 0);
}

inline void switch_context(Context* from, Context* to) {
  swapcontext(&from->context, &to->context);
}

#endif

}  // namespace simt
