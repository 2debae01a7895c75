// From tensors to launches, for every family: device, stream, scratch, errors.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include "common/dispatch.h"
#include "common/draw_options.h"
#include "common/row_view.h"
#include "cuda/embedding.cuh"
#include "cuda/rows.cuh"

namespace dmax::cuda {

// PyTorch's current stream on the device. The function lives in libtorch_cuda and is looked up at
// run time, which lets this library load beside a PyTorch without CUDA, too.
cudaStream_t current_stream(int device_index);

// Multiprocessors and limits of the device; an error for a GPU older than sm_80
const Device& device_properties(const char* op, int device_index);

// Counters of finished blocks (rows.cuh): zero before every launch, and again after it.
//
// No two launches that may run at the same time may share counters, and a launch must find them
// zero without a memset in front, which would be a second node in every captured graph.
//  - The launches of one stream run one after the other. Each (device, stream) therefore has its
//    own counters, found by the stream's id, which CUDA never uses twice.
//  - A captured launch may be replayed on any stream, beside eager launches and other graphs. It
//    gets counters that no other launch ever uses; a graph does not run beside itself.
// They come zeroed from 1 MiB blocks that live as long as the process. Capturing a launch takes at
// least 256 bytes of them for good. A new block waits for its own memset, on a stream of its own.
unsigned* zeroed_counters(const char* op, int64_t count, int device_index, cudaStream_t stream);

// One call of an op on the device of `tensor`, which is the current device meanwhile
class Call {
 public:
  Call(const char* op, const Tensor& tensor)
      : op_(op),
        index_(tensor.get_device_index()),
        guard_(index_),
        device(device_properties(op, index_)),
        stream(current_stream(index_)) {}

  // The result of a launch; names the remedy if this library was built for other GPUs
  void check(cudaError_t error) const;

  // Uninitialised memory from PyTorch's allocator: freed in the order of the stream, and under
  // capture a part of the graph's own pool
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

// A launch over rows of T whose tiles leave a Partial each: start(run) starts the kernel with
// run.shape and run.split, for which there is memory until it returns.
template <class T, class Partial, class Start>
void launch_rows(const Call& call, const Tensor& like, const RowWork& work, const Start& start) {
  RowLaunch run = choose_row_launch<T, Partial>(work, call.device);
  call.check_blocks(work.rows * run.split.splits);
  OptionalTensor partials;
  if (run.partial_bytes > 0) {
    partials = call.scratch(like, run.partial_bytes);
    run.split.partials = partials->mutable_data_ptr();
  }
  const int64_t counters = run.row_counters + work.more_counters;
  if (counters > 0) run.split.counters = call.counters(counters);
  call.check(start(run));
}

template <class T>
LogitsView<T> logits_view(const RowView& rows, int64_t suppress_token, double temperature) {
  return make_logits_view<T>(rows.tensor.const_data_ptr(), rows.row_stride, rows.width,
                             suppress_token, temperature);
}

// The mask `allowed` of an op, held for the launch: null where there is none
class Mask {
 public:
  Mask(const OptionalTensor& allowed, int64_t vocab) : given_(allowed.has_value()) {
    if (!given_) return;
    tensor_ = as_contiguous(*allowed);
    const int64_t words = mask_words(vocab);
    input_ = {tensor_->const_data_ptr<int32_t>(), tensor_->numel() == words ? 0 : words};
  }

  explicit operator bool() const { return given_; }
  const MaskInput& input() const { return input_; }

 private:
  bool given_;
  OptionalTensor tensor_;
  MaskInput input_{nullptr, 0};
};

// `rows` is the contiguous [..., D] that is written, or read beside the table
inline EmbeddingTable embedding_table(const RowView& embedding, int64_t mask_token_id,
                                      const Tensor& rows) {
  const ScalarType dtype = embedding.tensor.scalar_type();
  const ElementType type = dtype == ScalarType::Float      ? ElementType::kFloat
                           : dtype == ScalarType::BFloat16 ? ElementType::kBFloat16
                                                           : ElementType::kFloat16;
  return make_table(embedding.tensor.const_data_ptr(), embedding.row_stride, embedding.rows,
                    embedding.width, mask_token_id, type, rows.const_data_ptr());
}

// ---- Of top1.cu, for sample.cu ----

// Without score and weight the likeliest token wins, with them the sample of the highest score
std::tuple<Tensor, Tensor> merge_shards(const char* op, const Tensor& maximum,
                                        const Tensor& sum_exp, const Tensor& token,
                                        const OptionalTensor& score, const OptionalTensor& weight,
                                        double temperature);

}  // namespace dmax::cuda
