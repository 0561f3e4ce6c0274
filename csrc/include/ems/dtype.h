// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

namespace ems {

enum class DType : int32_t { kFloat32, kBFloat16, kFloat16, kFloat8E4M3 };

}  // namespace ems
