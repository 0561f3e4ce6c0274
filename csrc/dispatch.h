// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <stdexcept>

#include "ems/numeric.h"
#include "ems/params.h"

namespace ems {

// Calls f with a value-initialised element of the C++ type that stands for dtype, a float that can
// be computed with.
template <typename F>
void dispatch_dtype(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kFloat32:
      return f(float{});
    case DType::kBFloat16:
      return f(BFloat16{});
    case DType::kFloat16:
      return f(Float16{});
    default:
      break;
  }
  throw std::logic_error("ems_vllm: a dtype passed the argument checks that no kernel handles");
}

// The same for the dtype of a cache.
template <typename F>
void dispatch_cache_dtype(DType dtype, const F& f) {
  if (dtype == DType::kFloat8E4M3) return f(Float8E4M3{});
  return dispatch_dtype(dtype, f);
}

// Calls f with an element of a query and one of a cache that may go with it.
template <typename F>
void dispatch_dtypes(DType query_dtype, DType cache_dtype, const F& f) {
  dispatch_dtype(query_dtype, [&](auto element) {
    if (cache_dtype == DType::kFloat8E4M3) return f(element, Float8E4M3{});
    return f(element, element);
  });
}

}  // namespace ems
