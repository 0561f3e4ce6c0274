// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "ems/cta.cuh"
#include "ems/items.h"
#include "ems/params.h"
#include "ems/rank_key.h"

// rank_entries: a radix sort from the lowest digit up, through scratch memory. A warp takes a run
// of the keys of its own, in order, so equal digits stay in order and the threads of the CTA meet
// a few times a pass, however long the list is.
namespace ems {

constexpr int kRankThreads = 1024;
constexpr int kRankWarps = kRankThreads / device::kWarpSize;
constexpr int kRankDigitBits = 8;
constexpr int kRankDigits = 1 << kRankDigitBits;
constexpr int kRankPasses = 32 / kRankDigitBits;

struct RankShared {
  // Of the keys of each warp, how many have a digit; then where the next of them goes.
  int32_t places[kRankWarps][kRankDigits];
  ScanShared<int32_t, kRankThreads> counts;
};

// Turns the counts of digits and warps into the places of the first key of each.
EMS_DEVICE void place_digits(RankShared* shared) {
  constexpr int kThreadsPerDigit = kRankThreads / kRankDigits;
  constexpr int kPerThread = kRankWarps / kThreadsPerDigit;
  const int digit = device::thread_index() / kThreadsPerDigit;
  const int first_warp = device::thread_index() % kThreadsPerDigit * kPerThread;
  int32_t own = 0;
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) own += shared->places[first_warp + i][digit];
  int32_t place = scan_of_cta<kRankThreads>(own, &shared->counts).before;
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    int32_t* counter = &shared->places[first_warp + i][digit];
    const int32_t count = *counter;
    *counter = place;
    place += count;
  }
  device::sync_cta();
}

// Calls put(place, key) for the keys load(0), ..., load(count - 1), with the place of each in the
// order of a digit.
template <typename LOAD, typename PUT>
EMS_DEVICE void sort_digit(int shift, int32_t count, RankShared* shared, const LOAD& load,
                           const PUT& put) {
  const int lane = device::thread_index() % device::kWarpSize;
  int32_t* places = shared->places[device::thread_index() / device::kWarpSize];
  constexpr int32_t kWarpSize = device::kWarpSize;
  const int32_t per_warp = (count + kRankThreads - 1) / kRankThreads * kWarpSize;
  const int32_t first = device::thread_index() / kWarpSize * per_warp;
  const int32_t end = first + per_warp < count ? first + per_warp : count;
  const auto digit_of = [&](uint64_t key) {
    return static_cast<uint32_t>(key >> shift) & (kRankDigits - 1);
  };

  for (int i = lane; i < kRankDigits; i += kWarpSize) places[i] = 0;
  device::sync_warp();
  for (int32_t i = first + lane; i < end; i += kWarpSize) {
    device::add_shared(&places[digit_of(load(i))], 1);
  }
  device::sync_cta();
  place_digits(shared);
#pragma unroll 1
  for (int32_t start = first; start < end; start += kWarpSize) {
    const bool exists = start + lane < end;
    const uint64_t key = exists ? load(start + lane) : 0;
    const uint32_t digit = digit_of(key);
    // Lanes with the same digit.
    uint32_t peers = device::ballot(exists);
#pragma unroll
    for (int bit = 0; bit < kRankDigitBits; ++bit) {
      const bool is_set = digit >> bit & 1;
      const uint32_t set = device::ballot(is_set);
      peers &= is_set ? set : ~set;
    }
    const int num_before = device::count_bits(peers & ((1u << lane) - 1));
    const int32_t place = places[digit] + num_before;
    device::sync_warp();
    if (exists && num_before == 0) places[digit] += device::count_bits(peers);
    device::sync_warp();
    if (exists) put(place, key);
  }
  device::sync_cta();
}

// CTA x: item first_item + x. scratch: [CTAs, 2, max_entries] keys.
inline EMS_KERNEL(kRankThreads, 1)
    rank_entries_kernel(RankEntriesParams p, int64_t first_item, uint64_t* scratch) {
  auto& shared = device::shared_memory<RankShared>();
  const Item item = item_at(p, first_item + device::cta_x());
  const float* scores = p.scores.at(item.layer, item.row, item.head);
  float* weights = p.weights.at(item.layer, item.row, item.head);
  const Candidates candidates(p, item);
  const int32_t num_entries = p.num_entries[item.row];
  uint64_t* sorted = scratch + 2 * device::cta_x() * p.scores.length;
  uint64_t* next = sorted + p.scores.length;

  sort_digit(
      32, num_entries, &shared,
      [&](int32_t entry) {
        return rank_key(device::float_bits(scores[entry]), candidates.contain(entry), entry);
      },
      [&](int32_t place, uint64_t key) { sorted[place] = key; });
  for (int pass = 1; pass < kRankPasses - 1; ++pass) {
    sort_digit(
        32 + pass * kRankDigitBits, num_entries, &shared, [&](int32_t i) { return sorted[i]; },
        [&](int32_t place, uint64_t key) { next[place] = key; });
    uint64_t* before = sorted;
    sorted = next;
    next = before;
  }
  // The places of the last pass are the ranks.
  sort_digit(
      32 + (kRankPasses - 1) * kRankDigitBits, num_entries, &shared,
      [&](int32_t i) { return sorted[i]; },
      [&](int32_t rank, uint64_t key) {
        float& weight = weights[entry_of(key)];
        const float of_rank = competes(key) ? weight_of_rank(p, rank) : 1.0f;
        if (!competes(key) || of_rank > weight) weight = of_rank;
      });
  for (int64_t i = num_entries + device::thread_index(); i < p.weights.length; i += kRankThreads) {
    weights[i] = 0.0f;
  }
}

}  // namespace ems
