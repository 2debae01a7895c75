// Scheduling: the fibers of a block, the resident blocks, and a launch from first block to last.
#include "simt/executor.h"

#include <link.h>
#include <sys/mman.h>

#include <algorithm>
#include <sstream>
#include <stdexcept>

#include "simt/engine.h"

namespace simt {

Engine* engine = nullptr;
thread_local Worker* worker = nullptr;
size_t module_tls_size = 0;
static int launch_count = 0;

// ---- Switching ----

static void enter(Worker& w, Fiber& fiber) {
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

static unsigned pick_runnable(Worker& w) {
  return w.runnable.pop(engine->options.order == Order::kRandom ? engine->random() : 0);
}

bool coin() { return engine->options.order != Order::kRandom || (engine->random() & 1) != 0; }

void scheduling_point(Fiber& fiber) {
  const bool other_blocks = engine->workers.size() > 1;
  if (!other_blocks && engine->options.order != Order::kRandom) return;
  if (!coin()) return;
  worker->give_way = other_blocks;
  make_runnable(*worker, fiber);
  leave(fiber);
}

// ---- Reports ----

static std::string describe(const Fiber& fiber) {
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

static std::string report() {
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

static int choose_worker(const Worker& from) {
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
static void pass_turn(Worker& w) {
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

static int find_module_tls(dl_phdr_info* info, size_t, void* data) {
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

static void find_shared_memory(Worker& w) {
  engine->dynamic_shared();  // the first access creates this OS thread's copy
  TlsSearch search{reinterpret_cast<uintptr_t>(engine->dynamic_shared)};
  dl_iterate_phdr(find_module_tls, &search);
  w.tls_base = search.base;
  module_tls_size = search.size;
}

// Fills the block's shared memory: every float becomes NaN and every integer -1
static void poison_shared_memory(Worker& w) {
  if (tsan::active()) return;  // each block has a fresh OS thread there, and the stores would race
  Worker* keep = worker;
  auto* dynamic = static_cast<char*>(engine->dynamic_shared());
  if (__asan_unpoison_memory_region) __asan_unpoison_memory_region(dynamic, kMaxDynamicShared);
  // volatile, or this becomes a call to memset, which the sanitizers intercept
  volatile char* p = w.tls_base;
  volatile char* end = p + module_tls_size;
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

static void fiber_entry() {
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

static void start_block(Worker& w) {
  w.live = engine->grid.threads;
  w.arrived = 0;
  w.first_phase = w.cluster->phase;
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

// False if the launch has ended with an error
static bool run_block(Worker& w) {
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
static void finish_block(Worker& w) {
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

static void worker_main(Worker* w) {
  worker = w;
  w->tsan_native = tsan::active() ? __tsan_get_current_fiber() : nullptr;
  {
    std::unique_lock<std::mutex> lock(engine->mutex);
    w->turn.wait(lock, [&] { return engine->turn == w->id || engine->over; });
  }
  if (engine->over) return;
  find_shared_memory(*w);
  tsan::release(&w->cluster->begun_object);  // this OS thread has allocated it, and run no kernel
  poison_shared_memory(*w);
  while (!engine->over) {
    if (!run_block(*w)) return;
    finish_block(*w);
    pass_turn(*w);
  }
}

// ---- A launch ----

Options& options() {
  static Options options;
  return options;
}

const ThreadCoordinates& self() { return worker->current->at; }

// One fiber runs at a time, also where blocks have OS threads of their own
static int64_t bytes_read = 0;
void count_bytes_read(int64_t bytes) { bytes_read += bytes; }
int64_t take_bytes_read() {
  const int64_t bytes = bytes_read;
  bytes_read = 0;
  return bytes;
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
  // Under TSan, blocks never reuse stacks and shared memory, since reuse would look like a race
  const unsigned groups = tsan::active() ? clusters : std::min(clusters, std::max(1u, wanted));
  for (unsigned i = 0; i < clusters; ++i) launch.cluster_order.push_back(i);
  if (launch.options.order == Order::kReversed)
    std::reverse(launch.cluster_order.begin(), launch.cluster_order.end());
  if (launch.options.order == Order::kRandom)
    std::shuffle(launch.cluster_order.begin(), launch.cluster_order.end(), launch.random);

  // The resident blocks, each with its stacks
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
