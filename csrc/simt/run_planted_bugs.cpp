// The executor itself, for python_tests/test_simt_executor.py
#include <stdexcept>

#include "simt/bindings.h"
#include "simt/planted_bugs.cuh"

namespace simt::planted {

thread_local uint4 planted_dynamic[kMaxDynamicShared / sizeof(uint4)];
static void* planted_dynamic_base() { return planted_dynamic; }

using Kernel = void (*)(const float*, float*, bool);

static Kernel find(const std::string& name) {
  const std::pair<const char*, Kernel> kernels[] = {
      {"missing_syncthreads", missing_syncthreads},
      {"static_shared_off_by_one", static_shared_off_by_one},
      {"global_out_of_bounds", global_out_of_bounds},
      {"dynamic_shared_overrun", dynamic_shared_overrun},
      {"misaligned_vector", misaligned_vector},
      {"divergent_syncthreads", divergent_syncthreads},
      {"barrier_after_exit", barrier_after_exit},
      {"wrong_shuffle_mask", wrong_shuffle_mask},
      {"shuffle_from_outside_the_mask", shuffle_from_outside_the_mask},
      {"lane_missing_from_syncwarp", lane_missing_from_syncwarp},
      {"leaves_cluster_early", leaves_cluster_early},
      {"writes_to_a_block_before_it_begins", writes_to_a_block_before_it_begins},
      {"pushes_without_release", pushes_without_release},
      {"pushes_again_too_early", pushes_again_too_early},
      {"collectives", collectives},
  };
  for (const auto& [known, kernel] : kernels) {
    if (name == known) return kernel;
  }
  throw std::runtime_error("no planted kernel " + name);
}

// Input 1, 2, 3, ...; returns the output
std::vector<float> run_kernel(const std::string& name, bool fixed, unsigned blocks,
                              unsigned cluster) {
  std::vector<float> in(kThreads);
  std::vector<float> out(kThreads, 0.0f);
  for (int i = 0; i < kThreads; ++i) in[i] = static_cast<float>(i + 1);
  const Kernel kernel = find(name);
  const Grid grid{blocks, kThreads, kThreads * sizeof(float), cluster};
  run(grid, [&] { kernel(in.data(), out.data(), fixed); }, planted_dynamic_base);
  return out;
}

// Returns the sum and the final counter, which is 0 if it has reset itself
std::pair<float, unsigned> run_last_block_sums(int fence, unsigned blocks) {
  std::vector<float> parts(blocks);
  unsigned counter = 0;
  float out = 0;
  run(
      Grid{blocks, 32}, [&] { last_block_sums(parts.data(), &counter, &out, fence); },
      planted_dynamic_base);
  return {out, counter};
}

}  // namespace simt::planted
