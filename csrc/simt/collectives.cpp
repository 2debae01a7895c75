// What a CUDA thread calls: barriers, warp collectives, clusters, atomics and fences.
#include <algorithm>
#include <sstream>

#include "simt/engine.h"

namespace simt {

const char* name_of(WarpOp op) {
  static const char* const names[] = {"__syncwarp",        "__shfl_sync",      "__shfl_xor_sync",
                                      "__shfl_up_sync",    "__shfl_down_sync", "a vote",
                                      "__reduce_max_sync", "__reduce_min_sync"};
  return names[static_cast<int>(op)];
}

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
    w.barrier_parity ^= 1;  // a slow thread must not acquire the next barrier's clocks
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

void cluster_arrive(bool release) {
  Fiber& fiber = *worker->current;
  Cluster& cluster = *worker->cluster;
  fiber.cluster_phase = cluster.phase;
  if (release) tsan::release(&cluster.barrier_objects[cluster.phase % 2]);
  if (++cluster.arrived < cluster.workers.size() * engine->grid.threads) return;
  cluster.arrived = 0;
  ++cluster.phase;
  for (Worker* each : cluster.workers) {
    for (Fiber& f : each->fibers)
      if (f.state == State::kClusterBarrier) make_runnable(*each, f);
    if (each->status == Worker::Status::kAtClusterBarrier) each->status = Worker::Status::kReady;
  }
}

void cluster_wait(Site site) {
  Fiber& fiber = *worker->current;
  Cluster& cluster = *worker->cluster;
  if (cluster.phase == fiber.cluster_phase) {
    fiber.state = State::kClusterBarrier;
    fiber.site = site;
    leave(fiber);
  } else {
    scheduling_point(fiber);
  }
  // A slow thread must not acquire the clocks of the next barrier, which faster ones may be at
  tsan::acquire(&cluster.barrier_objects[fiber.cluster_phase % 2]);
  tsan::acquire(&cluster.begun_object);  // also after a relaxed arrival
}

void* map_shared_rank(void* shared, unsigned rank) {
  Worker& w = *worker;
  const auto offset = static_cast<size_t>(static_cast<char*>(shared) - w.tls_base);
  if (rank >= w.cluster->workers.size() || offset >= module_tls_size)
    give_up_from_fiber(*w.current, "map_shared_rank: not shared memory, or no such rank");
  // Until then the other block may not have begun
  if (rank != w.rank && w.cluster->phase == w.first_phase)
    give_up_from_fiber(*w.current, "map_shared_rank before the cluster's first barrier");
  return w.cluster->workers[rank]->tls_base + offset;
}

// Copies one TSan clock into another through a fiber that has not synchronized with anything else
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
    tsan::switch_to(worker->tsan_native);  // memory allocated here must not belong to a fiber
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

}  // namespace simt
