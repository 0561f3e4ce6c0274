// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "ems/macros.h"

// Which queries of a prompt score its keys when not all of them do: of every `stride` consecutive
// positions (a stratum), one. The choice depends on the position alone, so that chunks of a prompt
// sample the same queries however it is cut.
namespace ems {

constexpr int64_t kMaxSampleStride = 64;

// The position of a stratum that is used. Scattered, since a fixed place in every stratum could
// fall in step with a pattern in the text.
EMS_HOST_DEVICE constexpr int32_t sampled_position(int32_t stratum, int32_t stride) {
  const uint32_t hash = (static_cast<uint32_t>(stratum) + 1) * 0x9e3779b1u;
  return stratum * stride + static_cast<int32_t>((hash >> 16) % static_cast<uint32_t>(stride));
}

EMS_HOST_DEVICE constexpr bool is_sampled(int64_t position, int32_t stride) {
  const int32_t stratum = static_cast<int32_t>(position / stride);
  return sampled_position(stratum, stride) == position;
}

}  // namespace ems
