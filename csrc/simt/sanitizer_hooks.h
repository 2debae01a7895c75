// The sanitizers' own entry points, weak: absent in a plain build, present where a sanitizer's
// run-time library is loaded. One executor object file therefore serves every build.
#pragma once

#include <cstddef>

extern "C" {
#define SIMT_WEAK __attribute__((weak))
SIMT_WEAK void __sanitizer_start_switch_fiber(void** fake_stack, const void* bottom, size_t size);
SIMT_WEAK void __sanitizer_finish_switch_fiber(void* fake_stack, const void** bottom, size_t* size);
SIMT_WEAK void __asan_poison_memory_region(const volatile void* address, size_t size);
SIMT_WEAK void __asan_unpoison_memory_region(const volatile void* address, size_t size);
SIMT_WEAK void* __tsan_get_current_fiber();
SIMT_WEAK void* __tsan_create_fiber(unsigned flags);
SIMT_WEAK void __tsan_destroy_fiber(void* fiber);
SIMT_WEAK void __tsan_switch_to_fiber(void* fiber, unsigned flags);
SIMT_WEAK void __tsan_acquire(void* address);
SIMT_WEAK void __tsan_release(void* address);
#undef SIMT_WEAK
}

namespace simt::tsan {

constexpr unsigned kSwitchWithoutSync = 1;

inline bool active() { return __tsan_create_fiber != nullptr; }

inline void switch_to(void* fiber) {
  if (active()) __tsan_switch_to_fiber(fiber, kSwitchWithoutSync);
}
inline void acquire(void* object) {
  if (active()) __tsan_acquire(object);
}
inline void release(void* object) {
  if (active()) __tsan_release(object);
}

}  // namespace simt::tsan
