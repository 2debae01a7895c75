// Counters of finished blocks (row_split.cuh): zero before every launch, and again after it.
//
// Whose are they? A launch must not share them with one that may run at the same time, and must
// find them zero without a memset in front, which would be a second node in every captured graph.
//   - A stream's launches run one after the other, so each (device, stream) has counters of its
//   own,
//     known by the stream's id, which CUDA never gives out again.
//   - A captured launch may be replayed on any stream, beside eager launches and other graphs, so
//   it
//     gets counters that nobody else ever uses; a graph never runs beside itself.
// They come zeroed from 1 MiB blocks that live as long as the process; capturing a launch costs 256
// bytes or so for good. Only a new block waits for its own memset, on a stream of its own.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace dmax::cuda {

unsigned* zeroed_counters(const char* op, int64_t count, int device_index, cudaStream_t stream);

}  // namespace dmax::cuda
