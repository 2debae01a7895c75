// Dynamic shared memory of every kernel: one array per OS thread, hence one per resident block
#include "cuda/platform.cuh"

namespace dmax::cuda {
thread_local uint4 dynamic_shared[simt::kMaxDynamicShared / sizeof(uint4)];
}

void* simt::dynamic_shared_base() { return dmax::cuda::dynamic_shared; }
