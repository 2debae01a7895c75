// prefix_promote: one warp per row of `block` positions.
#pragma once

#include "common/semantics.h"
#include "cuda/platform.cuh"

namespace dmax::cuda {

struct PrefixPromoteArgs {
  const float* confidence;  // [rows, block]
  const bool* masked;
  bool* promoted;
  int64_t rows;
  int block;
  int64_t confidence_stride, masked_stride;  // of a row, in elements
  float threshold;
  bool inclusive;
};

constexpr int kPromoteWarps = 4;

__global__ void __launch_bounds__(kPromoteWarps* kWarpSize)
    prefix_promote_kernel(const __grid_constant__ PrefixPromoteArgs args) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kPromoteWarps + warp_id();
  if (row >= args.rows) return;
  const float* confidence = args.confidence + row * args.confidence_stride;
  const bool* masked = args.masked + row * args.masked_stride;
  bool* promoted = args.promoted + row * args.block;

  // 32 positions at a time; what has been found stays
  int first_masked = args.block;
  int first_failed = args.block;
  for (int begin = 0; begin < args.block; begin += kWarpSize) {
    const int i = begin + lane_id();
    // Both at once: a load that waited for the other would cost a memory latency
    const int at = min(i, args.block - 1);
    const bool masked_here = masked[at];
    float confidence_here = confidence[at];
    forget(confidence_here);
    const bool is_masked = i < args.block && masked_here;
    const bool failed = is_masked && !passes(confidence_here, args.threshold, args.inclusive);
    const uint32_t masked_lanes = __ballot_sync(kFullMask, is_masked);
    const uint32_t failed_lanes = __ballot_sync(kFullMask, failed);
    if (masked_lanes != 0) first_masked = min(first_masked, begin + __ffs(masked_lanes) - 1);
    if (failed_lanes != 0) first_failed = min(first_failed, begin + __ffs(failed_lanes) - 1);
    if (i < args.block) promoted[i] = is_promoted(i, is_masked, first_masked, first_failed);
  }
}

}  // namespace dmax::cuda
