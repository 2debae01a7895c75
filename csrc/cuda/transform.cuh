// transform_logits_: soft cap, bias and penalties of logits, in place.
//
// A thread has 16 bytes of logits at one place of several rows, one row after the other. What rows
// share, such as the counts of a block of positions, stays in its registers between them. Without
// soft cap and bias it loads only logits of tokens that have occurred, which are few.
#pragma once

#include "common/draw_options.h"
#include "common/penalties.h"
#include "cuda/elements.cuh"

namespace dmax::cuda {

// Rows of an operand, each shared by `per` rows of logits; null where it is absent
template <class T>
struct SharedRows {
  const T* data;
  unsigned per;

  __device__ __forceinline__ const T* of(unsigned row, int width) const {
    return data + static_cast<int64_t>(row / per) * width;
  }
};

struct TransformArgs {
  void* logits;
  int64_t row_stride;  // in elements
  unsigned rows;
  int vocab;
  float softcap, inverse_softcap;  // both 0: none
  SharedRows<float> bias;
  SharedRows<int32_t> counts;
  SharedRows<uint32_t> prompt;
  SharedRows<float> row_penalties;
  Penalties penalties;  // without row_penalties
  unsigned shared;      // rows that share every operand: the least `per` of all
  int columns;          // blocks beside each other over a row
  unsigned rows_per_block;
};

constexpr int kTransformThreads = 256;
constexpr int kTransformResident = 4;  // blocks per multiprocessor: 64 registers a thread

// Words first .. first + n of a row of `vocab` words, 0 outside of it
template <int n, class Word>
__device__ __forceinline__ void load_words(const Word* row, int first, int vocab, Word (&out)[n]) {
  static_assert(sizeof(Word) == 4, "16 bytes are four words");
  if (first >= 0 && first + n <= vocab && aligned_16(row + first)) {
#pragma unroll
    for (int i = 0; i < n; i += 4) {
      const uint4 raw = *reinterpret_cast<const uint4*>(row + first + i);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const uint32_t bits = word(raw, j);
        memcpy(&out[i + j], &bits, sizeof(bits));
      }
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < n; ++i) {
    const int id = first + i;
    out[i] = id >= 0 && id < vocab ? row[id] : Word{0};
  }
}

// Bits first .. first + 32 of a mask of `vocab` bits, 0 in front of it; those behind it are the
// padding of its last word
__device__ __forceinline__ uint32_t load_bits(const uint32_t* mask, int first, int vocab) {
  const int from = max(first, 0);
  const int words = static_cast<int>(mask_words(vocab));
  if (from / 32 >= words) return 0;
  const uint32_t low = mask[from / 32];
  const uint32_t high = from / 32 + 1 < words ? mask[from / 32 + 1] : 0;
  return __funnelshift_r(low, high, from % 32) << (from - first);
}

// What the rows of a group add to kWidth<T> logits: nothing of it depends on the logits
template <class T>
struct TransformOperands {
  float bias[kWidth<T>];
  int32_t counts[kWidth<T>];
  uint32_t seen;  // a bit per token that has occurred
  Penalties penalties;

  __device__ __forceinline__ void load(const TransformArgs& args, unsigned row, int first) {
    seen = 0;
    if (args.prompt.data != nullptr) {
      seen = load_bits(args.prompt.of(row, static_cast<int>(mask_words(args.vocab))), first,
                       args.vocab);
    }
    if (args.counts.data != nullptr) {
      load_words(args.counts.of(row, args.vocab), first, args.vocab, counts);
    }
    if (args.bias.data != nullptr) {
      load_words(args.bias.of(row, args.vocab), first, args.vocab, bias);
    }
#pragma unroll
    for (int e = 0; e < kWidth<T>; ++e) {
      if (args.counts.data == nullptr) counts[e] = 0;
      if (args.bias.data == nullptr) bias[e] = 0;
      if (counts[e] > 0) seen |= 1u << e;
    }
    seen &= (1u << kWidth<T>)-1;
    penalties = args.penalties;
    if (args.row_penalties.data != nullptr && seen != 0) {
      penalties = penalties_of(args.row_penalties.of(row, 3), 0);
      const float nan = __uint_as_float(0x7fc00000u);
      if (!penalties.valid()) penalties = {nan, nan, nan};
    }
  }

  __device__ __forceinline__ void apply(const TransformArgs& args, float (&x)[kWidth<T>]) const {
#pragma unroll
    for (int e = 0; e < kWidth<T>; ++e) {
      if (args.softcap > 0 && is_finite_number(x[e]))
        x[e] = args.softcap * tanhf(x[e] * args.inverse_softcap);
      if (args.bias.data != nullptr) x[e] += bias[e];
      if ((seen >> e & 1) != 0) x[e] = penalties.apply(x[e], counts[e]);
    }
  }
};

template <class T>
__global__ void __launch_bounds__(kTransformThreads, kTransformResident)
    transform_logits_kernel(const __grid_constant__ TransformArgs args) {
  constexpr int kElements = kWidth<T>;
  const unsigned part = blockIdx.x / static_cast<unsigned>(args.columns);
  const int column = static_cast<int>(blockIdx.x - part * static_cast<unsigned>(args.columns));
  const int begin =
      (column * kTransformThreads + static_cast<int>(threadIdx.x)) * kElements;  // less the shift
  const bool reads_all = args.softcap > 0 || args.bias.data != nullptr;

  TransformOperands<T> operands;
  int loaded_shift = -1;
  const unsigned first_row = part * args.rows_per_block;
  const unsigned end_row = min(first_row + args.rows_per_block, args.rows);
  for (unsigned row = first_row; row < end_row; ++row) {
    T* logits = static_cast<T*>(args.logits) + row * args.row_stride;
    // A row may start between two multiples of 16 bytes; vectors begin at the one before
    const int shift = static_cast<int>((reinterpret_cast<uintptr_t>(logits) & 15) / sizeof(T));
    const int first = begin - shift;
    if (first >= args.vocab) continue;
    if (shift != loaded_shift || row % args.shared == 0) operands.load(args, row, first);
    loaded_shift = shift;
    if (!reads_all && operands.seen == 0) continue;

    float x[kElements];
    T* place = logits + first;
    if (first >= 0 && first + kElements <= args.vocab) {
      const uint4 raw = *reinterpret_cast<const uint4*>(place);
#pragma unroll
      for (int e = 0; e < kElements; ++e) x[e] = element<T>(raw, e);
      operands.apply(args, x);
      *reinterpret_cast<uint4*>(place) = pack<T>(x);
      continue;
    }
#pragma unroll
    for (int e = 0; e < kElements; ++e) {
      const bool inside = first + e >= 0 && first + e < args.vocab;
      x[e] = inside ? to_float(place[e]) : 0.0f;
    }
    operands.apply(args, x);
#pragma unroll
    for (int e = 0; e < kElements; ++e) {
      if (first + e >= 0 && first + e < args.vocab) from_float(x[e], place + e);
    }
  }
}

// ---- Host side ----

// Sets how the work is cut: as many rows to a block as leave each multiprocessor about eight
// blocks, twice what it holds. Not timed yet.
template <class T>
LaunchShape cut_transform(TransformArgs* args, int multiprocessors) {
  constexpr int64_t kPerBlock = int64_t{kTransformThreads} * kWidth<T>;
  const int64_t columns = (args->vocab + kWidth<T> - 1 + kPerBlock - 1) / kPerBlock;
  const int64_t wanted = (int64_t{8} * multiprocessors + columns - 1) / columns;
  const int64_t parts = wanted < args->rows ? wanted : args->rows;
  const int64_t rows_per_block = (args->rows + parts - 1) / parts;
  args->columns = static_cast<int>(columns);
  args->rows_per_block = static_cast<unsigned>(rows_per_block);
  const int64_t blocks = columns * ((args->rows + rows_per_block - 1) / rows_per_block);
  return {static_cast<unsigned>(blocks), kTransformThreads, 0};
}

}  // namespace dmax::cuda
