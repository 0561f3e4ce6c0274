// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <stdexcept>
#include <string>

#include "dtype_pairs.h"
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

inline const char* name_of(DType dtype) {
  const char* name = "";
  dispatch_cache_dtype(dtype, [&](auto element) { name = DTypeTraits<decltype(element)>::name; });
  return name;
}

// "a or b": what a cache may be where queries have a dtype.
template <typename... PAIRS>
std::string caches_of(DType query_dtype, DTypePairs<PAIRS...>) {
  std::string text;
  const auto add = [&](bool goes_with_it, const char* name) {
    if (goes_with_it) text += (text.empty() ? "" : " or ") + std::string(name);
  };
  (add(query_dtype == DTypeTraits<typename PAIRS::Query>::dtype,
       DTypeTraits<typename PAIRS::Cache>::name),
   ...);
  return text;
}

// Calls f with an element of a query and one of a key cache, if the two are one of the pairs.
template <typename F, typename... PAIRS>
void dispatch_dtypes(const char* op, DType query_dtype, DType cache_dtype,
                     DTypePairs<PAIRS...> pairs, const F& f) {
  const bool found = ((query_dtype == DTypeTraits<typename PAIRS::Query>::dtype &&
                       cache_dtype == DTypeTraits<typename PAIRS::Cache>::dtype &&
                       (f(typename PAIRS::Query{}, typename PAIRS::Cache{}), true)) ||
                      ...);
  if (found) return;
  throw std::runtime_error(std::string("ems_vllm::") + op + ": key_cache must have dtype " +
                           caches_of(query_dtype, pairs) + " on this device with queries of " +
                           name_of(query_dtype) + ", got " + name_of(cache_dtype));
}

}  // namespace ems
