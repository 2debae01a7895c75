// The test-only Python module: executor, planted bugs and the ops' kernels
#include <pybind11/pybind11.h>

namespace simt::planted {
void bind(pybind11::module_& m);
}
namespace dmax::cuda {
void bind_ops(pybind11::module_& m);
}

PYBIND11_MODULE(dmax_simt, m) {
  simt::planted::bind(m);
  dmax::cuda::bind_ops(m);
}
