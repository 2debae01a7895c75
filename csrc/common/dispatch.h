// From a tensor's dtype to the element type of a kernel template.
#pragma once

#include "common/element_types.h"
#include "common/tensor_checks.h"

namespace dmax {

// Calls f(T{}) with the element type; the op's check has refused every other dtype before.
template <class F>
void dispatch_float(ScalarType dtype, const F& f) {
  switch (dtype) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::BFloat16:
      return f(BFloat16{});
    case ScalarType::Half:
      return f(Float16{});
    default:
      fail("dmax: no kernel for dtype ", dtype_name(dtype));
  }
}

}  // namespace dmax
