// The host side of the ops for the executor: what the .cu files do with tensors, done with vectors.
#pragma once

#include <stdexcept>
#include <vector>

#include "common/element_types.h"
#include "cuda/rows.cuh"
#include "simt/bindings.h"

namespace dmax::cuda {

template <class F>
void dispatch(int dtype, const F& f) {
  if (dtype == 0) return f(float{});
  if (dtype == 1) return f(BFloat16{});
  f(Float16{});
}

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

inline Device device_of(const Gpu& gpu) {
  return {gpu.multiprocessors, gpu.major, gpu.max_shared_per_block, gpu.most_cluster_rows, 0};
}

template <class T>
LogitsView<T> view_of(const LogitsInput& in) {
  return make_logits_view<T>(pointer<void>(in.data), in.stride, in.vocab, in.suppress_token,
                             in.temperature);
}

inline MaskInput mask_of(const LogitsInput& in) {
  return {pointer<const int32_t>(in.allowed), in.mask_stride};
}

// Exactly as large as the launch needs, which lets ASan see an overrun, and filled with NaN bytes,
// since a kernel must not rely on the contents of fresh scratch
struct Scratch {
  std::vector<uint4> bytes;
  explicit Scratch(size_t size) : bytes((size + 15) / 16, uint4{~0u, ~0u, ~0u, ~0u}) {}
  void* data() { return bytes.data(); }
};

// Zero before the launch; the kernel must leave them zero
struct Counters {
  std::vector<unsigned> values;
  explicit Counters(int64_t count) : values(count, 0u) {}
  ~Counters() noexcept(false) {
    for (unsigned value : values)
      if (value != 0) throw std::runtime_error("a counter did not reset itself");
  }
  unsigned* data() { return values.data(); }
};

// The counterpart of launch_rows in cuda/host.h
template <class T, class Partial, class Start>
Chosen launch_rows(const Gpu& gpu, const RowWork& work, const Start& start) {
  RowLaunch run = choose_row_launch<T, Partial>(work, device_of(gpu));
  Scratch partials(run.partial_bytes);
  Counters counters(run.row_counters + work.more_counters);
  run.split.partials = partials.data();
  run.split.counters = counters.data();
  start(run);
  return {run.split.splits, static_cast<int>(run.shape.cluster), run.shape.blocks,
          run.shape.threads};
}

}  // namespace dmax::cuda
