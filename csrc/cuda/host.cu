#include "cuda/host.h"

#include <dlfcn.h>

#include <atomic>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

#ifndef DMAX_CUDA_ARCHITECTURES
#error "the build names the GPUs it compiles for"
#endif

namespace dmax::cuda {

namespace {

void check_cuda(const char* op, cudaError_t error) {
  if (error == cudaSuccess) return;
  (void)cudaGetLastError();  // otherwise the next call reports it again
  if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction) {
    fail(op, ": dmax_kernels was built for GPUs of architecture ", DMAX_CUDA_ARCHITECTURES,
         ", which this one is not: install it again on this machine");
  }
  fail(op, ": CUDA error: ", cudaGetErrorString(error));
}

constexpr size_t kBlockCounters = (size_t{1} << 20) / sizeof(unsigned);
constexpr size_t kSlotCounters = 256 / sizeof(unsigned);  // no two launches share a cache line

// Bump allocation from zeroed blocks of device memory
class CounterPool {
 public:
  unsigned* of_stream(const char* op, size_t count, cudaStream_t stream) {
    unsigned long long id = 0;
    check_cuda(op, cudaStreamGetId(stream, &id));
    Slot& slot = slots_[id];
    if (slot.count < count) slot = {allocate(op, count), count};
    return slot.counters;
  }

  unsigned* allocate(const char* op, size_t count) {
    const size_t rounded = (count + kSlotCounters - 1) / kSlotCounters * kSlotCounters;
    if (left_ < rounded) {
      left_ = rounded > kBlockCounters ? rounded : kBlockCounters;
      next_ = zeroed_block(op, left_);
    }
    unsigned* counters = next_;
    next_ += rounded;
    left_ -= rounded;
    return counters;
  }

 private:
  struct Slot {
    unsigned* counters = nullptr;
    size_t count = 0;
  };

  // Also works while another stream, or this thread's own, is being captured
  static unsigned* zeroed_block(const char* op, size_t count) {
    struct RelaxedCapture {
      cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
      RelaxedCapture() { (void)cudaThreadExchangeStreamCaptureMode(&mode); }
      ~RelaxedCapture() { (void)cudaThreadExchangeStreamCaptureMode(&mode); }
    } relaxed;
    void* memory = nullptr;
    cudaStream_t stream = nullptr;
    check_cuda(op, cudaMalloc(&memory, count * sizeof(unsigned)));
    check_cuda(op, cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    check_cuda(op, cudaMemsetAsync(memory, 0, count * sizeof(unsigned), stream));
    check_cuda(op, cudaStreamSynchronize(stream));
    check_cuda(op, cudaStreamDestroy(stream));
    return static_cast<unsigned*>(memory);
  }

  std::map<unsigned long long, Slot> slots_;
  unsigned* next_ = nullptr;
  size_t left_ = 0;
};

}  // namespace

unsigned* zeroed_counters(const char* op, int64_t count, int device_index, cudaStream_t stream) {
  static std::mutex mutex;
  static auto* pools = new std::map<int, CounterPool>();  // never freed: it may outlive the driver
  const std::lock_guard<std::mutex> lock(mutex);
  CounterPool& pool = (*pools)[device_index];
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check_cuda(op, cudaStreamIsCapturing(stream, &status));
  if (status != cudaStreamCaptureStatusNone) return pool.allocate(op, static_cast<size_t>(count));
  return pool.of_stream(op, static_cast<size_t>(count), stream);
}

cudaStream_t current_stream(int device_index) {
  using GetStream = int32_t (*)(int32_t, void**);
  static const GetStream get_stream = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library == nullptr
               ? nullptr
               : reinterpret_cast<GetStream>(dlsym(library, "aoti_torch_get_current_cuda_stream"));
  }();
  DMAX_CHECK(get_stream != nullptr, "dmax: this PyTorch was built without CUDA");
  void* stream = nullptr;
  DMAX_CHECK(get_stream(device_index, &stream) == 0,
             "dmax: PyTorch has no current stream on cuda:", device_index);
  return static_cast<cudaStream_t>(stream);
}

// What dmax_cuda_tune sets
static std::atomic<int> most_cluster_rows{kMostClusterRows};
static std::atomic<int> forced_splits{0};

static Device read_properties(const char* op, int device_index) {
  const auto attribute = [&](cudaDeviceAttr which) {
    int value = 0;
    check_cuda(op, cudaDeviceGetAttribute(&value, which, device_index));
    return value;
  };
  const Device device{
      attribute(cudaDevAttrMultiProcessorCount), attribute(cudaDevAttrComputeCapabilityMajor),
      attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin), most_cluster_rows, forced_splits};
  DMAX_CHECK(device.major >= 8, op,
             ": needs a GPU of compute capability 8.0 or newer, cuda:", device_index, " has ",
             device.major, ".", attribute(cudaDevAttrComputeCapabilityMinor));
  return device;
}

constexpr int kMostDevices = 256;  // torch counts them in 8 bits
static std::atomic<const Device*> known[kMostDevices];

const Device& device_properties(const char* op, int device_index) {
  // Read by every call, and therefore without a lock. Two threads that come first may both read a
  // device's properties; the one that comes second lets go of its copy.
  DMAX_CHECK(device_index >= 0 && device_index < kMostDevices, op,
             ": no such device, cuda:", device_index);
  std::atomic<const Device*>& place = known[device_index];
  const Device* found = place.load(std::memory_order_acquire);
  if (found != nullptr) return *found;
  auto read = std::make_unique<const Device>(read_properties(op, device_index));
  if (place.compare_exchange_strong(found, read.get(), std::memory_order_acq_rel)) {
    return *read.release();  // it lives as long as the process
  }
  return *found;
}

void Call::check(cudaError_t error) const { check_cuda(op_, error); }

}  // namespace dmax::cuda

// For bench/gpu_calls.py, which times other splits of rows than those chosen (rows.cuh): a negative
// number stands for the choice. Calls on other threads at the same time may see either.
extern "C" __attribute__((visibility("default"))) void dmax_cuda_tune(int most_rows, int splits) {
  dmax::cuda::most_cluster_rows = most_rows < 0 ? dmax::cuda::kMostClusterRows : most_rows;
  dmax::cuda::forced_splits = splits < 0 ? 0 : splits;
  for (auto& device : dmax::cuda::known) device = nullptr;  // a few bytes are lost each time
}

// The GPUs compiled for, as `python -m dmax_kernels info` prints them
extern "C" __attribute__((visibility("default"))) const char* dmax_cuda_architectures() {
  return DMAX_CUDA_ARCHITECTURES;
}
