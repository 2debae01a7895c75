// csrc/cpu/parallel.h under ThreadSanitizer, on plain threads: OpenMP's own synchronisation is
// invisible to it. Every loop reads what other threads wrote in the loop before.
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <thread>
#include <vector>

namespace torch::stable {

int64_t threads = 1;

int64_t get_num_threads() { return threads; }

// As PyTorch's: ranges of at least `grain` indices, at most one for each thread. The later threads
// start late, as on a busy machine.
template <class F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& f) {
  const int64_t most = (end - begin + grain - 1) / grain;
  const int64_t count = std::min(most, threads);
  std::vector<std::thread> started;
  for (int64_t i = 1; i < count; ++i) {
    started.emplace_back([=, &f] {
      if (i % 2 == 1) std::this_thread::sleep_for(std::chrono::microseconds(200));
      f(begin + i * (end - begin) / count, begin + (i + 1) * (end - begin) / count);
    });
  }
  f(begin, begin + (end - begin) / count);
  for (std::thread& each : started) each.join();
}

}  // namespace torch::stable

#include "cpu/parallel.h"

using dmax::cpu::Loop;

// Three loops over `count` numbers; true if the third one's are right
bool runs(int64_t shares, int64_t count) {
  std::vector<int64_t> first(count), second(count), third(count);
  dmax::cpu::parallel_loops(shares,
                            Loop(count,
                                 [&](int64_t begin, int64_t end) {
                                   for (int64_t i = begin; i < end; ++i) first[i] = i;
                                 }),
                            Loop(count,
                                 [&](int64_t begin, int64_t end) {
                                   for (int64_t i = begin; i < end; ++i)
                                     second[i] = 2 * first[count - 1 - i];
                                 }),
                            Loop(count, [&](int64_t begin, int64_t end) {
                              for (int64_t i = begin; i < end; ++i)
                                third[i] = second[(i + count / 2) % count] + 1;
                            }));
  for (int64_t i = 0; i < count; ++i) {
    if (third[i] != 2 * (count - 1 - (i + count / 2) % count) + 1) return false;
  }
  return true;
}

int main() {
  for (int64_t& threads = torch::stable::threads; threads <= 4; ++threads) {
    for (int64_t shares = 1; shares <= 5; ++shares) {
      for (int64_t count : {1, 7, 64}) {
        for (int repetition = 0; repetition < 5; ++repetition) {
          if (runs(shares, count)) continue;
          std::printf("wrong: threads %d, shares %d, count %d\n", int(threads), int(shares),
                      int(count));
          return 1;
        }
      }
    }
  }
}
