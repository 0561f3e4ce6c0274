// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

// Shared memory that one CTA may have, in bytes.
namespace ems {

// What every GPU from compute capability 8.0 on gives. Capabilities 8.6, 8.9 and 12.x give no more,
// and code for 8.0 runs on the first two, so a kernel for all GPUs has to make do with it: one that
// asks for more is compiled and loaded without a word, and then cannot be launched there.
constexpr int64_t kSharedBytesAnywhere = 99 << 10;

// Capability 9.0, for kernels that are compiled for it alone.
constexpr int64_t kSharedBytesSm90 = 227 << 10;

}  // namespace ems
