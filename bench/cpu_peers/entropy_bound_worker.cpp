// What llama.cpp's diffusion example does for a rule that draws, restated: three plain passes over a
// row's float32 logits, a thread for each share of the rows. entropy_bound_worker.py compiles and calls it.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <thread>
#include <vector>

extern "C" void entropy_bound_worker(const float* logits, const float* uniform, int64_t rows,
                                     int64_t vocab, int threads, int64_t* top, int64_t* drawn,
                                     float* entropy) {
  auto work = [=](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const float* x = logits + row * vocab;
      int64_t best = 0;
      for (int64_t v = 1; v < vocab; ++v) {
        if (x[v] > x[best]) best = v;
      }
      float sum = 0;
      for (int64_t v = 0; v < vocab; ++v) sum += std::exp(x[v] - x[best]);
      const float log_sum = std::log(sum), inverse = 1 / sum;
      float cumulative = 0, surprise = 0;
      int64_t token = -1;
      for (int64_t v = 0; v < vocab; ++v) {
        const float shifted = x[v] - x[best];
        const float probability = std::exp(shifted) * inverse;
        if (probability > 0) surprise += probability * (log_sum - shifted);
        cumulative += probability;
        if (token < 0 && cumulative > uniform[row]) token = v;
      }
      top[row] = best;
      drawn[row] = token < 0 ? best : token;
      entropy[row] = surprise;
    }
  };
  std::vector<std::thread> others;
  const int64_t share = (rows + threads - 1) / threads;
  for (int64_t begin = share; begin < rows; begin += share) {
    others.emplace_back(work, begin, std::min(begin + share, rows));
  }
  work(0, std::min(share, rows));
  for (auto& each : others) each.join();
}
