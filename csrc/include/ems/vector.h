// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

namespace ems {

// What a thread moves at a time.
struct alignas(16) Vector16 {
  uint32_t words[4];
};

}  // namespace ems
