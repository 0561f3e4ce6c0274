// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "ems/numeric.h"
#include "ems/params.h"

// Which dtype of queries goes with which dtype of the cache, on each device. Kernels that score
// with queries are compiled for these pairs and no others. The Python side asks for them before it
// compresses a layer: build_info()["cpu_dtypes"] and build_info()["cuda_dtypes"].
namespace ems {

// dtypes and the C++ types that stand for them.
template <typename T>
struct DTypeTraits;

template <>
struct DTypeTraits<float> {
  static constexpr DType dtype = DType::kFloat32;
  static constexpr const char* name = "float32";
};

template <>
struct DTypeTraits<BFloat16> {
  static constexpr DType dtype = DType::kBFloat16;
  static constexpr const char* name = "bfloat16";
};

template <>
struct DTypeTraits<Float16> {
  static constexpr DType dtype = DType::kFloat16;
  static constexpr const char* name = "float16";
};

template <>
struct DTypeTraits<Float8E4M3> {
  static constexpr DType dtype = DType::kFloat8E4M3;
  static constexpr const char* name = "float8_e4m3fn";
};

template <typename QUERY, typename CACHE>
struct DTypePair {
  using Query = QUERY;
  using Cache = CACHE;
};

template <typename... PAIRS>
struct DTypePairs {};

namespace cpu {

using QueryCachePairs = DTypePairs<DTypePair<float, float>, DTypePair<BFloat16, BFloat16>,
                                   DTypePair<Float16, Float16>, DTypePair<float, Float8E4M3>,
                                   DTypePair<BFloat16, Float8E4M3>, DTypePair<Float16, Float8E4M3>>;

}  // namespace cpu

namespace cuda {

// Tensor cores multiply keys that come as float8 in the queries' dtype, of 16 bits.
using QueryCachePairs =
    DTypePairs<DTypePair<float, float>, DTypePair<BFloat16, BFloat16>, DTypePair<Float16, Float16>,
               DTypePair<BFloat16, Float8E4M3>, DTypePair<Float16, Float8E4M3>>;

}  // namespace cuda
}  // namespace ems
