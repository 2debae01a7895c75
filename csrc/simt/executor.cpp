#include "simt/executor.h"

#include <link.h>
#include <sys/mman.h>

#include <algorithm>
#include <condition_variable>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <sstream>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "simt/fiber.h"
#include "simt/sanitizer_hooks.h"

namespace simt {
namespace {

constexpr size_t kStackBytes = 128 * 1024;

enum class State { kRunnable, kBarrier, kWarp, kClusterBarrier, kLeft };

const char* name_of(WarpOp op) {
  static const char* const names[] = {
      "__syncwarp",        "__shfl_sync",       "__shfl_xor_sync",
      "__shfl_up_sync",    "__shfl_down_sync",  "a vote",
      "__reduce_max_sync", "__reduce_min_sync", "__reduce_add_sync"};
  return names[static_cast<int>(op)];
}

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

  // C++-like fences for TSan: what this thread's last fence published, and what its next one takes
  char fence_clock = 0;
  bool has_fenced = false;
  std::vector<char*> seen_by_atomics;

  // Of the warp whose first lane this is
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
  // The oldest, or with `skip` another one in its place
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
  char barrier_object = 0;
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
  std::deque<char> objects;  // addresses that TSan hangs its clocks on

  char* new_object() { return &objects.emplace_back(0); }
};

Engine* engine = nullptr;
thread_local Worker* worker = nullptr;
int launch_count = 0;

// ---- Switching ----

void enter(Worker& w, Fiber& fiber) {
  w.current = &fiber;
  void* fake_stack = nullptr;
  if (__sanitizer_start_switch_fiber)
    __sanitizer_start_switch_fiber(&fake_stack, fiber.stack, kStackBytes);
  tsan::switch_to(fiber.tsan_fiber);
  switch_context(&w.scheduler, &fiber.context);
  if (__sanitizer_finish_switch_fiber)
    __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
}

void leave(Fiber& fiber) {
  Worker& w = *worker;
  tsan::switch_to(w.tsan_native);
  if (__sanitizer_start_switch_fiber) {
    void** keep = fiber.state == State::kLeft ? nullptr : &fiber.asan_fake_stack;
    __sanitizer_start_switch_fiber(keep, w.native_stack, w.native_stack_size);
  }
  switch_context(&fiber.context, &w.scheduler);
  if (__sanitizer_finish_switch_fiber)
    __sanitizer_finish_switch_fiber(fiber.asan_fake_stack, nullptr, nullptr);
}

void make_runnable(Worker& w, Fiber& fiber) {
  fiber.state = State::kRunnable;
  w.runnable.push(fiber.index);
}

unsigned pick_runnable(Worker& w) {
  return w.runnable.pop(engine->options.order == Order::kRandom ? engine->random() : 0);
}

bool coin() { return engine->options.order != Order::kRandom || (engine->random() & 1) != 0; }

// Lets other threads and resident blocks run before this thread goes on
void scheduling_point(Fiber& fiber) {
  const bool other_blocks = engine->workers.size() > 1;
  if (!other_blocks && engine->options.order != Order::kRandom) return;
  if (!coin()) return;
  worker->give_way = other_blocks;
  make_runnable(*worker, fiber);
  leave(fiber);
}

// ---- Reports ----

std::string describe(const Fiber& fiber) {
  std::ostringstream text;
  switch (fiber.state) {
    case State::kLeft:
      return "have left the kernel";
    case State::kRunnable:
      return "can run";
    case State::kBarrier:
      text << "wait at __syncthreads";
      break;
    case State::kClusterBarrier:
      text << "wait at the cluster's barrier";
      break;
    case State::kWarp:
      text << "wait in " << name_of(fiber.op) << " with mask 0x" << std::hex << fiber.mask;
      break;
  }
  text << std::dec << " (" << fiber.site.file << ":" << fiber.site.line << ")";
  return text.str();
}

std::string report() {
  std::ostringstream text;
  for (const auto& w : engine->workers) {
    if (w->status == Worker::Status::kFinished) continue;
    text << "\n  block " << w->block << ":";
    for (size_t begin = 0; begin < w->fibers.size();) {
      const std::string what = describe(w->fibers[begin]);
      size_t end = begin + 1;
      while (end < w->fibers.size() && describe(w->fibers[end]) == what) ++end;
      text << "\n    threads " << begin << "-" << end - 1 << " " << what;
      begin = end;
    }
  }
  return text.str();
}

// Ends the launch: every fiber is abandoned where it stands
void give_up(const std::string& message) {
  std::lock_guard<std::mutex> lock(engine->mutex);
  if (engine->error.empty()) engine->error = message + report();
  engine->over = true;
  for (auto& w : engine->workers) w->turn.notify_all();
}

[[noreturn]] void give_up_from_fiber(Fiber& fiber, const std::string& message) {
  give_up(message);
  for (;;) leave(fiber);
}

// ---- Which resident block runs ----

int choose_worker(const Worker& from) {
  const int count = static_cast<int>(engine->workers.size());
  std::vector<int> ready;
  for (int i = 1; i <= count; ++i) {
    const int step = engine->options.order == Order::kReversed ? count - i : i;
    const int id = (from.id + step) % count;
    if (engine->workers[id]->status == Worker::Status::kReady) ready.push_back(id);
  }
  if (ready.empty()) return -1;
  return engine->options.order == Order::kRandom ? ready[engine->random() % ready.size()]
                                                 : ready[0];
}

// Returns when it is this block's turn again, or the launch is over
void pass_turn(Worker& w) {
  const int next = choose_worker(w);
  if (next == w.id) return;
  if (next < 0) {
    const bool finished =
        std::all_of(engine->workers.begin(), engine->workers.end(),
                    [](auto& each) { return each->status == Worker::Status::kFinished; });
    if (!finished) return give_up("deadlock: nothing can end these waits");
    std::lock_guard<std::mutex> lock(engine->mutex);
    engine->over = true;
    for (auto& each : engine->workers) each->turn.notify_all();
    return;
  }
  std::unique_lock<std::mutex> lock(engine->mutex);
  engine->turn = next;
  engine->workers[next]->turn.notify_all();
  w.turn.wait(lock, [&] { return engine->turn == w.id || engine->over; });
}

// ---- Shared memory ----

struct TlsSearch {
  uintptr_t inside;
  char* base = nullptr;
  size_t size = 0;
};

int find_module_tls(dl_phdr_info* info, size_t, void* data) {
  auto* search = static_cast<TlsSearch*>(data);
  bool ours = false;
  size_t size = 0;
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const auto& header = info->dlpi_phdr[i];
    const uintptr_t begin = info->dlpi_addr + header.p_vaddr;
    if (header.p_type == PT_LOAD && search->inside - begin < header.p_memsz) ours = true;
    if (header.p_type == PT_TLS) size = header.p_memsz;
  }
  if (!ours) return 0;
  search->base = static_cast<char*>(info->dlpi_tls_data);
  search->size = size;
  return 1;
}

size_t tls_size = 0;

void find_shared_memory(Worker& w) {
  engine->dynamic_shared();  // a first touch, so that this OS thread has its copy
  TlsSearch search{reinterpret_cast<uintptr_t>(engine->dynamic_shared)};
  dl_iterate_phdr(find_module_tls, &search);
  w.tls_base = search.base;
  tls_size = search.size;
}

// NaN in every float and -1 in every integer of the block's shared memory
void poison_shared_memory(Worker& w) {
  if (tsan::active()) return;  // each block has a fresh OS thread there, and the stores would race
  Worker* keep = worker;
  auto* dynamic = static_cast<char*>(engine->dynamic_shared());
  if (__asan_unpoison_memory_region) __asan_unpoison_memory_region(dynamic, kMaxDynamicShared);
  // volatile, or it becomes a call to memset, which the sanitizers intercept
  volatile char* p = w.tls_base;
  volatile char* end = p + tls_size;
  for (; p + sizeof(uint64_t) <= end; p += sizeof(uint64_t))
    *reinterpret_cast<volatile uint64_t*>(p) = ~uint64_t{0};
  for (; p < end; ++p) *p = static_cast<char>(0xFF);
  worker = keep;
  if (__asan_poison_memory_region) {
    const size_t size = engine->grid.shared_bytes;
    __asan_poison_memory_region(dynamic + size, kMaxDynamicShared - size);
  }
}

// ---- A block's life ----

void fiber_entry() {
  Fiber* fiber = worker->current;
  if (__sanitizer_finish_switch_fiber) {
    Worker& w = *worker;
    __sanitizer_finish_switch_fiber(nullptr, &w.native_stack, &w.native_stack_size);
  }
  tsan::acquire(&engine->launch_object);
  (*engine->thread_main)();
  tsan::release(&engine->done_object);
  fiber->state = State::kLeft;
  leave(*fiber);
}

void complete_warp_if_ready(Worker& w, unsigned first_lane, uint32_t mask, Fiber* arriving);

void start_block(Worker& w) {
  w.live = engine->grid.threads;
  w.arrived = 0;
  w.runnable.reset(w.live);
  for (unsigned i = 0; i < w.live; ++i) {
    Fiber& fiber = w.fibers[i];
    fiber.state = State::kRunnable;
    fiber.has_fenced = false;
    fiber.seen_by_atomics.clear();
    fiber.at = {dim3(i), dim3(w.block),       dim3(w.live), dim3(engine->grid.blocks),
                w.rank,  engine->grid.cluster};
    fiber.asan_fake_stack = nullptr;
    if (tsan::active()) fiber.tsan_fiber = __tsan_create_fiber(0);
    prepare(&fiber.context, fiber.stack, kStackBytes, fiber_entry);
    w.runnable.push(engine->options.order == Order::kReversed ? w.live - 1 - i : i);
  }
}

// False where the launch has ended with an error
bool run_block(Worker& w) {
  start_block(w);
  while (w.live > 0) {
    if (w.runnable.empty()) {
      if (engine->clusters[0].workers.size() == 1 ||
          std::none_of(w.fibers.begin(), w.fibers.end(),
                       [](Fiber& f) { return f.state == State::kClusterBarrier; })) {
        give_up("deadlock: nothing can end these waits");
        return false;
      }
      w.status = Worker::Status::kAtClusterBarrier;
      pass_turn(w);
      if (engine->over) return false;
      continue;
    }
    Fiber& fiber = w.fibers[pick_runnable(w)];
    enter(w, fiber);
    if (engine->over) return false;
    if (fiber.state == State::kLeft) {
      --w.live;
      if (tsan::active()) __tsan_destroy_fiber(fiber.tsan_fiber);
      const unsigned first_lane = fiber.index / kWarpSize * kWarpSize;
      for (unsigned i = first_lane; i < std::min<size_t>(first_lane + kWarpSize, w.fibers.size());
           ++i)
        if (w.fibers[i].state == State::kWarp)
          complete_warp_if_ready(w, first_lane, w.fibers[i].mask, nullptr);
      if (engine->over) return false;
    }
    if (w.give_way) {
      w.give_way = false;
      pass_turn(w);
      if (engine->over) return false;
    }
  }
  poison_shared_memory(w);  // for the next block, and for peers that read it after we left
  return true;
}

// Hands the group its next cluster of blocks once all of its workers are done with the last one
void finish_block(Worker& w) {
  Cluster& cluster = *w.cluster;
  w.status = Worker::Status::kWaitsForCluster;
  if (++cluster.finished < cluster.workers.size()) return;
  cluster.finished = 0;
  const bool more = engine->next_cluster < engine->cluster_order.size();
  const unsigned index = more ? engine->cluster_order[engine->next_cluster++] : 0;
  for (Worker* each : cluster.workers) {
    each->status = more ? Worker::Status::kReady : Worker::Status::kFinished;
    each->block = index * engine->grid.cluster + each->rank;
  }
}

void worker_main(Worker* w) {
  worker = w;
  w->tsan_native = tsan::active() ? __tsan_get_current_fiber() : nullptr;
  {
    std::unique_lock<std::mutex> lock(engine->mutex);
    w->turn.wait(lock, [&] { return engine->turn == w->id || engine->over; });
  }
  if (engine->over) return;
  find_shared_memory(*w);
  poison_shared_memory(*w);
  while (!engine->over) {
    if (!run_block(*w)) return;
    finish_block(*w);
    pass_turn(*w);
  }
}

// ---- Collectives ----

void complete_warp_if_ready(Worker& w, unsigned first_lane, uint32_t mask, Fiber* arriving) {
  Fiber* lanes[kWarpSize] = {};
  Fiber* any = nullptr;
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if (!(mask >> lane & 1) || first_lane + lane >= w.fibers.size()) continue;
    Fiber& fiber = w.fibers[first_lane + lane];
    if (fiber.state == State::kLeft) continue;
    if (fiber.state != State::kWarp || fiber.mask != mask) return;
    lanes[lane] = any = &fiber;
  }
  uint64_t combined = any->op == WarpOp::kReduceMin ? UINT32_MAX : 0;
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if (!lanes[lane]) continue;
    const uint64_t value = lanes[lane]->value;
    if (any->op == WarpOp::kBallot) combined |= static_cast<uint64_t>(value != 0) << lane;
    if (any->op == WarpOp::kReduceMax) combined = std::max(combined, value);
    if (any->op == WarpOp::kReduceMin) combined = std::min(combined, value);
    if (any->op == WarpOp::kReduceAdd) combined = static_cast<uint32_t>(combined + value);
  }
  for (int lane = 0; lane < kWarpSize; ++lane) {
    Fiber* fiber = lanes[lane];
    if (!fiber) continue;
    int source = lane;
    if (fiber->op == WarpOp::kShuffle) source = fiber->argument & (kWarpSize - 1);
    if (fiber->op == WarpOp::kShuffleXor) source = lane ^ fiber->argument;
    if (fiber->op == WarpOp::kShuffleUp) source = lane - fiber->argument;
    if (fiber->op == WarpOp::kShuffleDown) source = lane + fiber->argument;
    const bool shuffle = fiber->op >= WarpOp::kShuffle && fiber->op <= WarpOp::kShuffleDown;
    if (source < 0 || source >= kWarpSize) source = lane;
    if (shuffle && !lanes[source]) {
      std::ostringstream text;
      text << name_of(fiber->op) << " at " << fiber->site.file << ":" << fiber->site.line
           << ": lane " << lane << " reads lane " << source << ", which is outside mask 0x"
           << std::hex << mask << " or has left";
      return give_up(text.str());
    }
    fiber->result = shuffle ? lanes[source]->value : combined;
  }
  for (int i = 0; i < kWarpSize; ++i) {
    const int lane = engine->options.order == Order::kReversed ? kWarpSize - 1 - i : i;
    if (lanes[lane] && lanes[lane] != arriving) make_runnable(w, *lanes[lane]);
  }
  if (arriving) arriving->state = State::kRunnable;
}

}  // namespace

Options& options() {
  static Options options;
  return options;
}

const ThreadCoordinates& self() { return worker->current->at; }

uint64_t warp_collective(WarpOp op, uint32_t mask, uint64_t value, int argument, Site site) {
  Worker& w = *worker;
  Fiber& fiber = *w.current;
  const unsigned lane = fiber.index % kWarpSize;
  const unsigned first_lane = fiber.index - lane;
  fiber.state = State::kWarp;
  fiber.op = op;
  fiber.mask = mask;
  fiber.value = value;
  fiber.argument = argument;
  fiber.site = site;
  if (!(mask >> lane & 1))
    give_up_from_fiber(fiber,
                       std::string(name_of(op)) + ": the calling lane is not in its own mask");
  for (int other = 0; other < kWarpSize; ++other) {
    if (!(mask >> other & 1) || first_lane + other >= w.fibers.size()) continue;
    const Fiber& peer = w.fibers[first_lane + other];
    if (peer.state != State::kWarp || !(peer.mask >> lane & 1)) continue;
    if (peer.op != op || peer.mask != mask || peer.site.line != site.line)
      give_up_from_fiber(fiber, "the lanes of a warp do not agree on their collective");
  }
  Fiber& leader = w.fibers[first_lane];
  char* object = &leader.syncwarp_objects[leader.syncwarp_parity];
  if (op == WarpOp::kSync) tsan::release(object);
  complete_warp_if_ready(w, first_lane, mask, &fiber);
  if (fiber.state == State::kRunnable && op == WarpOp::kSync) leader.syncwarp_parity ^= 1;
  if (engine->over || fiber.state == State::kWarp) leave(fiber);
  if (op == WarpOp::kSync) tsan::acquire(object);
  return fiber.result;
}

int block_barrier(BarrierKind kind, int predicate, Site site) {
  Worker& w = *worker;
  Fiber& fiber = *w.current;
  fiber.state = State::kBarrier;
  fiber.site = site;
  if (w.arrived == 0) {
    w.barrier_kind = kind;
    w.barrier_site = site;
    w.count_true = 0;
  } else if (w.barrier_kind != kind || w.barrier_site.line != site.line) {
    give_up_from_fiber(fiber, "the threads of a block wait at different __syncthreads");
  }
  w.count_true += predicate != 0;
  char* object = &w.barrier_objects[w.barrier_parity];
  tsan::release(object);
  if (++w.arrived == w.fibers.size()) {
    const int count = w.count_true;
    const bool all = count == static_cast<int>(w.fibers.size());
    w.barrier_result = kind == BarrierKind::kOr    ? count > 0
                       : kind == BarrierKind::kAnd ? all
                                                   : count;
    w.arrived = 0;
    w.barrier_parity ^= 1;  // a slow thread of this barrier never takes in the next one's clocks
    for (unsigned i = 0; i < w.fibers.size(); ++i) {
      const unsigned index =
          engine->options.order == Order::kReversed ? w.fibers.size() - 1 - i : i;
      make_runnable(w, w.fibers[index]);
    }
    w.give_way = engine->workers.size() > 1 && coin();
  }
  leave(fiber);
  tsan::acquire(object);
  return w.barrier_result;
}

void cluster_barrier(Site site) {
  Fiber& fiber = *worker->current;
  Cluster& cluster = *worker->cluster;
  fiber.state = State::kClusterBarrier;
  fiber.site = site;
  tsan::release(&cluster.barrier_object);
  if (++cluster.arrived == cluster.workers.size() * engine->grid.threads) {
    cluster.arrived = 0;
    for (Worker* each : cluster.workers) {
      for (Fiber& f : each->fibers) make_runnable(*each, f);
      each->status = Worker::Status::kReady;
    }
    worker->give_way = engine->workers.size() > 1 && coin();
  }
  leave(fiber);
  tsan::acquire(&cluster.barrier_object);
}

void* map_shared_rank(void* shared, unsigned rank) {
  Worker& w = *worker;
  const auto offset = static_cast<size_t>(static_cast<char*>(shared) - w.tls_base);
  if (rank >= w.cluster->workers.size() || offset >= tls_size)
    give_up_from_fiber(*w.current, "map_shared_rank: not shared memory, or no such rank");
  Worker& peer = *w.cluster->workers[rank];
  if (!peer.tls_base)
    give_up_from_fiber(*w.current, "map_shared_rank before the cluster's first barrier");
  return peer.tls_base + offset;
}

// Moves one TSan clock into another through a context that knows nothing else
static void copy_clock(char* from, char* to) {
  void* courier = __tsan_create_fiber(0);
  tsan::switch_to(courier);
  tsan::acquire(from);
  tsan::release(to);
  tsan::switch_to(worker->tsan_native);
  __tsan_destroy_fiber(courier);
}

void after_atomic(const void* address) {
  Fiber& fiber = *worker->current;
  if (tsan::active()) {
    tsan::switch_to(worker->tsan_native);  // what is allocated here belongs to no fiber
    char*& object = engine->atomic_objects[address];
    if (!object) object = engine->new_object();
    char* seen = engine->new_object();
    copy_clock(object, seen);
    fiber.seen_by_atomics.push_back(seen);
    if (fiber.has_fenced) copy_clock(&fiber.fence_clock, object);
    tsan::switch_to(fiber.tsan_fiber);
  }
  scheduling_point(fiber);
}

void fence() {
  Fiber& fiber = *worker->current;
  for (char* seen : fiber.seen_by_atomics) tsan::acquire(seen);
  fiber.seen_by_atomics.clear();
  tsan::release(&fiber.fence_clock);
  fiber.has_fenced = true;
}

int take_launch_count() {
  const int count = launch_count;
  launch_count = 0;
  return count;
}

void run(const Grid& grid, const std::function<void()>& thread_main, void* (*dynamic_shared)()) {
  if (grid.threads < 1 || grid.threads > 1024 || grid.blocks < 1 || grid.cluster < 1 ||
      grid.blocks % grid.cluster != 0 || grid.shared_bytes > kMaxDynamicShared)
    throw std::runtime_error("launch: no such grid on a GPU");
  Engine launch;
  engine = &launch;
  launch.grid = grid;
  launch.options = options();
  launch.thread_main = &thread_main;
  launch.dynamic_shared = dynamic_shared;
  launch.random.seed(launch.options.seed);
  ++launch_count;

  // Clusters of blocks, in the order in which they start
  const unsigned clusters = grid.blocks / grid.cluster;
  const unsigned wanted = static_cast<unsigned>(launch.options.resident_blocks) / grid.cluster;
  // Under TSan two blocks never share stacks and shared memory, or their reuse would look like
  // races
  const unsigned groups = tsan::active() ? clusters : std::min(clusters, std::max(1u, wanted));
  for (unsigned i = 0; i < clusters; ++i) launch.cluster_order.push_back(i);
  if (launch.options.order == Order::kReversed)
    std::reverse(launch.cluster_order.begin(), launch.cluster_order.end());
  if (launch.options.order == Order::kRandom)
    std::shuffle(launch.cluster_order.begin(), launch.cluster_order.end(), launch.random);

  // Resident blocks, each with its stacks
  launch.clusters.resize(groups);
  const size_t stack_bytes = kStackBytes * grid.threads;
  for (unsigned g = 0; g < groups; ++g) {
    const unsigned index = launch.cluster_order[launch.next_cluster++];
    for (unsigned rank = 0; rank < grid.cluster; ++rank) {
      launch.workers.push_back(std::make_unique<Worker>());
      Worker& w = *launch.workers.back();
      w.id = static_cast<int>(launch.workers.size()) - 1;
      w.cluster = &launch.clusters[g];
      w.rank = rank;
      w.block = index * grid.cluster + rank;
      w.fibers.resize(grid.threads);
      w.stacks = static_cast<char*>(mmap(nullptr, stack_bytes, PROT_READ | PROT_WRITE,
                                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
      if (w.stacks == MAP_FAILED)
        throw std::runtime_error("launch: no memory for the fibers' stacks");
      for (unsigned i = 0; i < grid.threads; ++i) {
        w.fibers[i].index = i;
        w.fibers[i].stack = w.stacks + i * kStackBytes;
      }
      launch.clusters[g].workers.push_back(&w);
    }
  }

  tsan::release(&launch.launch_object);
  for (auto& w : launch.workers) w->thread = std::thread(worker_main, w.get());
  for (auto& w : launch.workers) w->thread.join();
  tsan::acquire(&launch.done_object);
  for (auto& w : launch.workers) {
    if (__asan_unpoison_memory_region) __asan_unpoison_memory_region(w->stacks, stack_bytes);
    munmap(w->stacks, stack_bytes);
  }
  engine = nullptr;
  if (!launch.error.empty()) throw std::runtime_error(launch.error);
}

}  // namespace simt
