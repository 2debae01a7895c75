// The host side that every <op>.cu shares: device, stream, scratch, errors of a launch.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include "common/dispatch.h"
#include "common/row_view.h"
#include "cuda/counters.h"
#include "cuda/rows.cuh"

namespace dmax::cuda {

// PyTorch's current stream on the device. The function lives in libtorch_cuda and is looked up at
// run time, so that this library also loads where torch is CPU-only.
cudaStream_t current_stream(int device_index);

// Multiprocessors and limits of the device; an error for a GPU older than sm_80
const Device& device_properties(const char* op, int device_index);

// One call of an op on the device of `tensor`, which is the current one meanwhile
class Call {
 public:
  Call(const char* op, const Tensor& tensor)
      : op_(op),
        index_(tensor.get_device_index()),
        guard_(index_),
        device(device_properties(op, index_)),
        stream(current_stream(index_)) {}

  // Of a launch; says what to do about a library built for other GPUs
  void check(cudaError_t error) const;

  // Uninitialised memory, from PyTorch's allocator: ordered with the stream, and of the graph's own
  // pool under capture
  Tensor scratch(const Tensor& like, size_t bytes) const {
    return empty_like_device(like, {static_cast<int64_t>(bytes)}, ScalarType::Byte);
  }

  unsigned* counters(int64_t count) const { return zeroed_counters(op_, count, index_, stream); }

  void check_blocks(int64_t blocks) const {
    DMAX_CHECK(blocks < (int64_t{1} << 31), op_, ": too many rows for one launch, got ", blocks,
               " blocks");
  }

 private:
  const char* op_;
  int index_;
  torch::stable::accelerator::DeviceGuard guard_;

 public:
  const Device& device;
  const cudaStream_t stream;
};

// Partial results and counters of a RowLaunch, for as long as the launch needs them
class RowScratch {
 public:
  RowScratch(const Call& call, const Tensor& like, const RowLaunch& launch)
      : partials_(call.scratch(like, launch.scratch_bytes)),
        split(row_split(launch, launch.splits > 1 ? partials_.mutable_data_ptr() : nullptr,
                        launch.splits > 1 ? call.counters(launch.counters) : nullptr)) {}

 private:
  Tensor partials_;

 public:
  const RowSplit split;
};

template <class T>
LogitsView<T> logits_view(const RowView& view, int64_t suppress_token, double temperature) {
  return make_logits_view<T>(view.tensor.const_data_ptr(), view.row_stride, view.width,
                             suppress_token, temperature);
}

}  // namespace dmax::cuda
