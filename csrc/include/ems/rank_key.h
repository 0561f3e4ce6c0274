// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "ems/items.h"
#include "ems/macros.h"
#include "ems/params.h"

// What rank_entries sorts, and what it makes of a rank.
namespace ems {

// The entries of an item that compete.
struct Candidates {
  int32_t first;
  const bool* is_protected;  // [max_entries], nullable

  EMS_HOST_DEVICE Candidates(const RankEntriesParams& p, const Item& item)
      : first(p.num_protected[item.row]),
        is_protected(p.is_protected.data == nullptr
                         ? nullptr
                         : p.is_protected.at(item.layer, item.row, item.head)) {}

  EMS_HOST_DEVICE bool contain(int32_t entry) const {
    return entry >= first && (is_protected == nullptr || !is_protected[entry]);
  }
};

// Ascending keys are descending scores, then ascending entries; what does not compete comes last.
// Scores are >= 0, so their bits are ordered as they are; the sign of -0 does not count.
EMS_HOST_DEVICE inline uint64_t rank_key(uint32_t score_bits, bool competes, int32_t entry) {
  const uint32_t high = competes ? ~score_bits & 0x7fffffffu : 0xffffffffu;
  return static_cast<uint64_t>(high) << 32 | static_cast<uint32_t>(entry);
}

EMS_HOST_DEVICE inline bool competes(uint64_t key) { return key >> 63 == 0; }

EMS_HOST_DEVICE inline int32_t entry_of(uint64_t key) { return static_cast<int32_t>(key); }

// Every operation is rounded to float32, so all devices agree bit for bit.
EMS_HOST_DEVICE inline float weight_of_rank(const RankEntriesParams& p, int32_t rank) {
  const auto place = static_cast<float>(rank);
  const float claim = place < p.first ? place / p.first : (place - p.first) / p.share + 1.0f;
  return 1.0f / (claim + 1.0f);
}

}  // namespace ems
