// The loops of a draw, in the best instruction set that the CPU has. See tile_kernels.h.
//
// A draw tile (kDrawTile ids) is the unit of the draw. Its mass is always added in one order, the
// same on every instruction set, so that a draw depends on neither threads nor shards.
#pragma once

#include <cstdint>

#include "common/constants.h"
#include "common/element_types.h"

namespace dmax::cpu {

// Counter-based noise of one row (Philox4x32-10; see dmax_kernels/reference/sample.py)
struct NoiseKey {
  uint64_t seed;
  uint64_t offset;
  uint32_t row;
};

struct PerturbedBest {
  float score;
  int64_t id;
};

// x begins at a draw tile and holds ceil(n / kDrawTile) of them, none with a NaN or +inf
template <class T>
struct DrawKernels {
  // The largest of each draw tile; returns the largest of all, NaN if an element is NaN
  float (*maxima)(const T* x, int64_t n, float* maxima);
  // Sum of 2^((x - maximum of the tile) * scale) over each draw tile
  void (*masses)(const T* x, int64_t n, const float* maxima, float scale, float* masses);
  // y = x where the mask's bit is set, elsewhere -inf
  void (*widen_allowed)(float* y, const T* x, int64_t n, const uint32_t* bits);
  // Appends the elements from `threshold` on, and their ids, which begin at first_id; returns how
  // many. Both outputs have room for 16 elements more than it returns.
  int64_t (*collect)(const T* x, int64_t n, float threshold, int32_t first_id, float* values,
                     int32_t* ids);
  // Adds 2^((x - maximum) * scale) of each element above -inf to the amount of its bucket, which is
  // (maximum - x) * per_unit, rounded down, or the last one if that is beyond it
  void (*histogram)(const T* x, int64_t n, float maximum, float scale, float per_unit, int buckets,
                    double* amounts);
  // As collect(), the elements of one bucket
  int64_t (*collect_bucket)(const T* x, int64_t n, float maximum, float per_unit, int buckets,
                            int bucket, int32_t first_id, float* values, int32_t* ids);
};

// What follows from the draw tiles or from collected elements is float32 whatever T was
struct RaceKernels {
  // Arg-max of x / temperature + Gumbel noise over the counters first..first + n, if above `best`
  PerturbedBest (*race)(const float* x, int64_t n, int64_t first, NoiseKey key, float temperature,
                        PerturbedBest best);
  // scores = maximum / temperature + log(mass), -inf where there is no mass
  void (*log_masses)(const float* maxima, const float* masses, int64_t n, float temperature,
                     float* scores);
  // Sum of mass * 2^((x - maximum) * scale), where x are the tiles' maxima
  double (*total_mass)(const float* x, const float* masses, int64_t n, float maximum, float scale);
  // y = 2^((x - maximum) * scale)
  void (*weights)(const float* x, float* y, int64_t n, float maximum, float scale);
  // x = -inf where it is below `threshold`
  void (*drop_below)(float* x, int64_t n, float threshold);
};

template <class T>
const DrawKernels<T>& draw_kernels();
template <class T>
const DrawKernels<T>& draw_kernels_of(const T*) {
  return draw_kernels<T>();
}
const RaceKernels& race_kernels();

}  // namespace dmax::cpu
