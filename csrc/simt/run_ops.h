// The host side of the ops for the executor: what cuda/<op>.cu does with tensors, with vectors.
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
  return {gpu.multiprocessors, gpu.major, gpu.max_shared_per_block};
}

template <class T>
LogitsView<T> view_of(const LogitsInput& in) {
  return make_logits_view<T>(pointer<void>(in.data), in.stride, in.vocab, in.suppress_token,
                             in.temperature);
}

inline Chosen chosen(const RowLaunch& launch) {
  return {launch.splits, 1, launch.shape.blocks, launch.shape.threads};
}

// Exactly as large as the launch needs, so that ASan sees an overrun, and filled with bytes that
// are NaN: a kernel may not count on fresh scratch
struct Scratch {
  std::vector<uint4> bytes;
  explicit Scratch(size_t size) : bytes((size + 15) / 16, uint4{~0u, ~0u, ~0u, ~0u}) {}
  void* data() { return bytes.data(); }
};

// Zero before the launch; the kernel must leave them so
struct Counters {
  std::vector<unsigned> values;
  explicit Counters(int64_t count) : values(count, 0u) {}
  ~Counters() noexcept(false) {
    for (unsigned value : values)
      if (value != 0) throw std::runtime_error("a counter did not reset itself");
  }
  unsigned* data() { return values.data(); }
};

}  // namespace dmax::cuda
