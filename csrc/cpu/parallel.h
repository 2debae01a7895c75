// Threads, as PyTorch's own CPU ops use them.
#pragma once

#include <algorithm>

#include "common/torch_stable.h"

namespace dmax::cpu {

// Calls f(begin, end) over [0, count); each thread gets at least `grain` indices
template <class F>
void parallel_for(int64_t count, int64_t grain, const F& f) {
  if (count <= 0) return;
  torch::stable::parallel_for(0, count, std::max<int64_t>(grain, 1), f);
}

inline int64_t num_threads() { return torch::stable::get_num_threads(); }

}  // namespace dmax::cpu
