// Threads, as PyTorch's own CPU ops use them.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <thread>
#include <vector>

#include "common/torch_stable.h"

namespace dmax::cpu {

// Calls f(begin, end) over [0, count); each thread gets at least `grain` indices
template <class F>
void parallel_for(int64_t count, int64_t grain, const F& f) {
  if (count <= 0) return;
  torch::stable::parallel_for(0, count, std::max<int64_t>(grain, 1), f);
}

inline int64_t num_threads() { return torch::stable::get_num_threads(); }

// Waits until the counter has reached `value`. It spins for about 100 us before it offers the core
// to others: on a busy machine they keep it for milliseconds.
inline void wait_for(const std::atomic<int64_t>& counter, int64_t value) {
  constexpr int kSpins = 4096;
  for (int spins = 0; counter.load(std::memory_order_acquire) < value;) {
    if (spins == kSpins) {
      std::this_thread::yield();
      continue;
    }
    ++spins;
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("isb");  // most of these CPUs do not wait in a yield
#endif
  }
}

// A loop over [0, count): body(begin, end)
template <class Body>
struct Loop {
  Loop(int64_t indices, const Body& f) : count(indices), body(f) {}
  int64_t count;
  Body body;
};

// Runs loops one after another in one parallel region. Each is cut into the same number of shares;
// a thread takes the same share of every loop, and so finds in its cache what it has read before.
//
// A thread enters a loop once all shares of the loop before are finished. Until then it takes those
// that nobody has begun, and then waits for threads that are in the middle of one. The loops hence
// end however few threads PyTorch starts; inside another parallel region it starts none. Only the
// last loop may throw: the other threads would wait for a share that is never finished.
template <class... Bodies>
void parallel_loops(int64_t shares, const Loop<Bodies>&... loops) {
  constexpr size_t kLoops = sizeof...(loops);
  std::vector<std::atomic<bool>> begun(kLoops * shares);
  std::array<std::atomic<int64_t>, kLoops> finished{};
  parallel_for(shares, 1, [&](int64_t first, int64_t last) {
    for (int64_t own = first; own < last; ++own) {
      size_t at = 0;
      const auto go_through = [&](const auto& loop) {
        for (int64_t i = 0; i < shares; ++i) {
          const int64_t share = (own + i) % shares;
          if (begun[at * shares + share].exchange(true, std::memory_order_relaxed)) continue;
          loop.body(share * loop.count / shares, (share + 1) * loop.count / shares);
          finished[at].fetch_add(1, std::memory_order_release);
        }
        if (at + 1 < kLoops) wait_for(finished[at], shares);
        ++at;
      };
      (go_through(loops), ...);
    }
  });
}

}  // namespace dmax::cpu
