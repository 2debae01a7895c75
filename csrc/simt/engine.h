// The executor's state and the functions that its two files share; executor.h says what it does.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "simt/executor.h"
#include "simt/fiber.h"
#include "simt/sanitizer_hooks.h"

namespace simt {

constexpr size_t kStackBytes = 128 * 1024;

enum class State { kRunnable, kBarrier, kWarp, kClusterBarrier, kLeft };

struct Fiber {
  Context context;
  char* stack = nullptr;
  void* asan_fake_stack = nullptr;
  void* tsan_fiber = nullptr;
  ThreadCoordinates at;
  unsigned index = 0;

  State state = State::kRunnable;
  Site site{"", 0};
  WarpOp op = WarpOp::kSync;
  uint32_t mask = 0;
  uint64_t value = 0;
  int argument = 0;
  uint64_t result = 0;
  unsigned cluster_phase = 0;  // of the cluster's barrier at which it arrived

  // C++-like fences for TSan: the clock that this thread's last fence released, and the clocks that
  // its next one acquires
  char fence_clock = 0;
  bool has_fenced = false;
  std::vector<char*> seen_by_atomics;

  // State of the warp whose first lane this is
  char syncwarp_objects[2] = {0, 0};
  unsigned syncwarp_parity = 0;
};

// Threads that can run. It never allocates, since TSan would see a fiber's memory freed by another.
class RunQueue {
 public:
  void reset(size_t capacity) {
    slots_.resize(capacity);
    head_ = size_ = 0;
  }
  bool empty() const { return size_ == 0; }
  void push(unsigned index) { slots_[(head_ + size_++) % slots_.size()] = index; }
  // The oldest, or with `skip` a different one in its place
  unsigned pop(size_t skip) {
    std::swap(slots_[head_], slots_[(head_ + skip % size_) % slots_.size()]);
    const unsigned index = slots_[head_];
    head_ = (head_ + 1) % slots_.size();
    --size_;
    return index;
  }

 private:
  std::vector<unsigned> slots_;
  size_t head_ = 0;
  size_t size_ = 0;
};

struct Cluster;

// One resident block and the OS thread that hosts it
struct Worker {
  enum class Status { kReady, kAtClusterBarrier, kWaitsForCluster, kFinished };
  int id = 0;
  Status status = Status::kReady;
  Cluster* cluster = nullptr;
  unsigned rank = 0;
  unsigned block = 0;
  unsigned first_phase = 0;  // of the cluster's barrier when the block began
  std::thread thread;
  std::condition_variable turn;
  Context scheduler;
  void* tsan_native = nullptr;
  const void* native_stack = nullptr;
  size_t native_stack_size = 0;
  char* tls_base = nullptr;
  char* stacks = nullptr;
  std::vector<Fiber> fibers;
  RunQueue runnable;
  Fiber* current = nullptr;
  unsigned live = 0;
  bool give_way = false;

  unsigned arrived = 0;
  BarrierKind barrier_kind = BarrierKind::kSync;
  Site barrier_site{"", 0};
  int count_true = 0;
  int barrier_result = 0;
  unsigned barrier_parity = 0;
  char barrier_objects[2] = {0, 0};
};

// The workers of one group; a launch without clusters has groups of one
struct Cluster {
  std::vector<Worker*> workers;
  unsigned finished = 0;
  unsigned arrived = 0;
  unsigned phase = 0;                // barriers that all threads have arrived at
  char barrier_objects[2] = {0, 0};  // of the even phases and of the odd ones
  char begun_object = 0;             // the blocks' shared memory exists
};

struct Engine {
  Grid grid;
  Options options;
  const std::function<void()>* thread_main = nullptr;
  void* (*dynamic_shared)() = nullptr;
  std::vector<std::unique_ptr<Worker>> workers;
  std::vector<Cluster> clusters;
  std::vector<unsigned> cluster_order;
  size_t next_cluster = 0;
  std::mt19937_64 random;
  std::mutex mutex;
  int turn = 0;
  bool over = false;
  std::string error;
  char launch_object = 0;
  char done_object = 0;
  std::map<const void*, char*> atomic_objects;
  std::deque<char> objects;  // their addresses stand for TSan's clocks

  char* new_object() { return &objects.emplace_back(0); }
};

extern Engine* engine;               // of the current launch
extern thread_local Worker* worker;  // the block that this OS thread hosts
extern size_t module_tls_size;       // of a block's shared memory, static and dynamic

// Leaves the fiber for its block's scheduler; returns when it runs again
void leave(Fiber& fiber);
void make_runnable(Worker& w, Fiber& fiber);
// Lets other threads and resident blocks run before this thread goes on
void scheduling_point(Fiber& fiber);
// Whether to go on at a scheduling point; the in-order and reversed orders always do
bool coin();

// Ends the launch with the message and a report; every fiber is abandoned where it is
void give_up(const std::string& message);
[[noreturn]] void give_up_from_fiber(Fiber& fiber, const std::string& message);

const char* name_of(WarpOp op);
// Ends the collective that waits for `mask` once all of its live lanes have arrived
void complete_warp_if_ready(Worker& w, unsigned first_lane, uint32_t mask, Fiber* arriving);

}  // namespace simt
