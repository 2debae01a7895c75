// Runs CUDA kernels on the CPU, for tests: each CUDA thread is a fiber, each resident block an OS
// thread. One fiber runs at a time, in an order that a seed fixes, so a failure repeats.
//
// It detects barriers that only some threads reach or that they reach from different lines, masks
// that the lanes do not agree on, source lanes outside the mask, waits that nothing can end (with
// the file and line at which each thread waits), and reads of shared memory that was never written
// (it is filled with NaN before every block). The sanitizer builds add addresses, undefined
// behaviour and data races; executor.cpp itself is always built without them.
//
// Not modelled: weak memory outside TSan, occupancy, bank conflicts, approximate-math rounding.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace simt {

constexpr int kWarpSize = 32;
constexpr size_t kMaxDynamicShared = 227 * 1024;

enum class Order { kInOrder, kReversed, kRandom };

// How the following launches of this process run
struct Options {
  Order order = Order::kInOrder;
  uint64_t seed = 0;
  int resident_blocks = 1;
};
Options& options();

// Where a thread waits, for reports
struct Site {
  const char* file;
  int line;
};

struct ThreadCoordinates {
  dim3 thread, block, block_dim, grid_dim;
  unsigned cluster_rank, cluster_size;
};
const ThreadCoordinates& self();

enum class BarrierKind { kSync, kOr, kAnd, kCount };
int block_barrier(BarrierKind kind, int predicate, Site site);

enum class WarpOp {
  kSync,
  kShuffle,
  kShuffleXor,
  kShuffleUp,
  kShuffleDown,
  kBallot,
  kReduceMax,
  kReduceMin,
};
uint64_t warp_collective(WarpOp op, uint32_t mask, uint64_t value, int argument, Site site);

// The two halves of a cluster's barrier, and the address of `shared` in the block with that rank.
// Without `release`, what the thread wrote before it arrived is not handed to the others.
void cluster_arrive(bool release);
void cluster_wait(Site site);
void* map_shared_rank(void* shared, unsigned rank);

// Scheduling points that TSan is told about: after an atomic on `address`, and for __threadfence
void after_atomic(const void* address);
void fence();

struct Grid {
  unsigned blocks = 1;
  unsigned threads = 1;
  size_t shared_bytes = 0;
  unsigned cluster = 1;
};

// Calls `thread_main` once per CUDA thread; throws std::runtime_error with a report on misuse.
// `dynamic_shared` gives the base of the calling OS thread's dynamic shared memory.
void run(const Grid& grid, const std::function<void()>& thread_main, void* (*dynamic_shared)());

// The number of launches since the last call, for tests that count them
int take_launch_count();

// Bytes that load_constant has read since the last call
void count_bytes_read(int64_t bytes);
int64_t take_bytes_read();

}  // namespace simt
