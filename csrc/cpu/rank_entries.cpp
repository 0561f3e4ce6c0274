// SPDX-License-Identifier: Apache-2.0

// One item per layer, row and kv_head. A radix sort from the lowest digit up takes three passes
// whatever the scores are, and leaves equal ones in the order of their entries.

#include <algorithm>
#include <array>
#include <memory>
#include <utility>
#include <vector>

#include "cpu/index_checks.h"
#include "cpu/parallel.h"
#include "ems/numeric.h"
#include "ems/rank_key.h"
#include "launchers.h"

namespace ems::cpu {
namespace {

constexpr int kDigitBits = 11;
constexpr int kNumPasses = 3;  // 32 bits
using Places = std::array<int32_t, 1 << kDigitBits>;

void check_indices(const RankEntriesParams& p) {
  const IndexChecks checks("rank_entries");
  for (int64_t row = 0; row < p.num_rows; ++row) {
    checks.in_range("num_entries", row, p.num_entries[row], 0, p.scores.length);
    checks.in_range("num_protected", row, p.num_protected[row], 0, p.num_entries[row]);
  }
}

// Where the next key with the same digit goes.
int32_t& place_of(Places& places, uint64_t key, int pass) {
  return places[key >> (32 + pass * kDigitBits) & (places.size() - 1)];
}

// weight_of: [max_entries], by rank.
void rank_head(const RankEntriesParams& p, const Item& item, const float* weight_of) {
  const float* scores = p.scores.at(item.layer, item.row, item.head);
  float* weights = p.weights.at(item.layer, item.row, item.head);
  const Candidates candidates(p, item);
  const int32_t num_entries = p.num_entries[item.row];

  const auto keys = std::make_unique_for_overwrite<uint64_t[]>(2 * int64_t{num_entries});
  uint64_t* from = keys.get();
  uint64_t* to = from + num_entries;
  std::array<Places, kNumPasses> places{};
  for (int32_t entry = 0; entry < num_entries; ++entry) {
    const uint64_t key =
        rank_key(bit_cast<uint32_t>(scores[entry]), candidates.contain(entry), entry);
    from[entry] = key;
    for (int pass = 0; pass < kNumPasses; ++pass) ++place_of(places[pass], key, pass);
  }
  for (Places& counts : places) {
    int32_t sum = 0;
    for (int32_t& count : counts) sum += std::exchange(count, sum);
  }
  for (int pass = 0; pass < kNumPasses - 1; ++pass) {
    for (int32_t i = 0; i < num_entries; ++i) to[place_of(places[pass], from[i], pass)++] = from[i];
    std::swap(from, to);
  }
  // The places of the last pass are the ranks.
  for (int32_t i = 0; i < num_entries; ++i) {
    const int32_t rank = place_of(places[kNumPasses - 1], from[i], kNumPasses - 1)++;
    float& weight = weights[entry_of(from[i])];
    weight = competes(from[i]) ? std::max(weight, weight_of[rank]) : 1.0f;
  }
  std::fill(weights + num_entries, weights + p.weights.length, 0.0f);
}

}  // namespace

void rank_entries(const RankEntriesParams& p) {
  check_indices(p);
  std::vector<float> weight_of(p.scores.length);
  for (int64_t rank = 0; rank < p.scores.length; ++rank) weight_of[rank] = weight_of_rank(p, rank);
  parallel_heads(p, [&](const Item& item) { rank_head(p, item, weight_of.data()); });
}

}  // namespace ems::cpu
