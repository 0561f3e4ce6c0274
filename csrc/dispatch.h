// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <stdexcept>

#include "ems/numeric.h"
#include "ems/params.h"

namespace ems {

// Calls f with a value-initialised element of the C++ type that stands for dtype.
template <typename F>
void dispatch_dtype(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kFloat32:
      return f(float{});
    case DType::kBFloat16:
      return f(BFloat16{});
    case DType::kFloat16:
      return f(Float16{});
  }
  throw std::logic_error("ems_vllm: a dtype passed the argument checks that no kernel handles");
}

}  // namespace ems
