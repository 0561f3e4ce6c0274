// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "ems/cta.cuh"
#include "ems/items.h"
#include "ems/params.h"

// select_entries: a radix selection finds the scores at which keeping and merging end, one pass
// over the entries deals them out, and only the candidates for merging, few beside the entries, are
// sorted.
namespace ems {

constexpr int kSelectThreads = 512;
constexpr int kDigitBits = 11;
constexpr int kNumDigits = 1 << kDigitBits;
// Candidates up to this many are sorted in shared memory.
constexpr int32_t kMaxSharedCandidates = 4096;

struct alignas(16) SelectShared {
  int32_t histogram[kNumDigits];
  ScanShared<int32_t, kSelectThreads> counts;
  ScanShared<double, kSelectThreads> masses;
  int32_t digit;
  int32_t num_above;
  int32_t num_merged;
};

inline int64_t select_shared_bytes(int32_t sort_len) {
  const int64_t keys = sort_len <= kMaxSharedCandidates ? sort_len : 0;
  return static_cast<int64_t>(sizeof(SelectShared)) + keys * static_cast<int64_t>(sizeof(uint64_t));
}

// Where a number of highest scores ends: all above `key`, and the first num_equal at it.
struct Threshold {
  uint32_t key;
  int32_t num_equal;
};

// Scores are >= 0, so their bits are ordered as they are; the sign of -0 does not count.
EMS_DEVICE uint32_t score_key(float score) { return device::float_bits(score) & 0x7fffffffu; }

// The threshold of the `count` highest scores of entries first..end-1.
EMS_DEVICE Threshold find_threshold(const float* scores, int32_t first, int32_t end, int32_t count,
                                    SelectShared* shared) {
  if (count <= 0) return {0xffffffffu, 0};
  const int thread = device::thread_index();
  constexpr int kShifts[] = {21, 10, 0};
  constexpr int kWidths[] = {11, 11, 10};
  uint32_t prefix = 0;
#pragma unroll
  for (int pass = 0; pass < 3; ++pass) {
    for (int i = thread; i < kNumDigits; i += kSelectThreads) shared->histogram[i] = 0;
    device::sync_cta();
    for (int32_t entry = first + thread; entry < end; entry += kSelectThreads) {
      const uint32_t key = score_key(scores[entry]);
      // Two shifts: by 32 bits in one is undefined.
      if (key >> kShifts[pass] >> kWidths[pass] == prefix) {
        device::add_shared(&shared->histogram[key >> kShifts[pass] & ((1u << kWidths[pass]) - 1)],
                           1);
      }
    }
    device::sync_cta();
    // Thread 0 has the highest digits.
    constexpr int kPerThread = kNumDigits / kSelectThreads;
    const int highest = kNumDigits - 1 - thread * kPerThread;
    int32_t own = 0;
    for (int i = 0; i < kPerThread; ++i) own += shared->histogram[highest - i];
    int32_t above = scan_of_cta<kSelectThreads>(own, &shared->counts).before;
    if (above < count && count <= above + own) {
      int digit = highest;
      while (above + shared->histogram[digit] < count) above += shared->histogram[digit--];
      shared->digit = digit;
      shared->num_above = above;
    }
    device::sync_cta();
    prefix = prefix << kWidths[pass] | static_cast<uint32_t>(shared->digit);
    count -= shared->num_above;
    device::sync_cta();
  }
  return {prefix, count};
}

// CTA x: item first_item + x. sort_scratch: [CTAs, sort_len] keys, used where they do not fit in
// shared memory, which begins with a SelectShared and goes on with them.
inline EMS_KERNEL(kSelectThreads, 1)
    select_entries_kernel(SelectEntriesParams p, int64_t first_item, int32_t sort_len,
                          uint64_t* sort_scratch) {
  auto& shared = device::shared_memory<SelectShared>();
  uint64_t* keys = sort_len <= kMaxSharedCandidates ? reinterpret_cast<uint64_t*>(&shared + 1)
                                                    : sort_scratch + device::cta_x() * sort_len;
  const int thread = device::thread_index();
  const Item item = item_at(p, first_item + device::cta_x());
  const float* scores = p.scores.at(item.layer, item.row, item.head);
  int32_t* kept = p.kept_idx.at(item.layer, item.row, item.head);
  int32_t* merged = p.merge_idx.at(item.layer, item.row, item.head);
  const int32_t num_entries = p.num_entries[item.row];
  const int32_t num_protected = p.num_protected[item.row];
  const int32_t budget = p.budgets[item.row];
  const int32_t num_left = num_entries - budget;
  const int32_t limit = p.merge_limits[item.row] < num_left ? p.merge_limits[item.row] : num_left;

  const Threshold keep =
      find_threshold(scores, num_protected, num_entries, budget - num_protected, &shared);
  const Threshold merge = limit > 0 ? find_threshold(scores, num_protected, num_entries,
                                                     budget - num_protected + limit, &shared)
                                    : Threshold{0xffffffffu, 0};

  // Two counts share an integer in the scans below: each is at most the number of threads.
  constexpr int32_t kSecond = 1 << 16;
  int32_t num_keep_equal = 0, num_merge_equal = 0, num_kept = 0, num_candidates = 0;
  double total_mass = 0, kept_mass = 0;
  for (int32_t start = 0; start < num_entries; start += kSelectThreads) {
    const int32_t entry = start + thread;
    const bool exists = entry < num_entries;
    const bool is_protected = entry < num_protected;
    const float score = exists ? scores[entry] : 0.0f;
    const uint32_t key = score_key(score);
    const bool competes = exists && !is_protected;
    const bool keep_equal = competes && key == keep.key;
    const bool merge_equal = competes && key == merge.key;
    const Scan<int32_t> ties = scan_of_cta<kSelectThreads>(
        (keep_equal ? 1 : 0) + (merge_equal ? kSecond : 0), &shared.counts);
    const bool is_kept = (exists && is_protected) || (competes && key > keep.key) ||
                         (keep_equal && num_keep_equal + ties.before % kSecond < keep.num_equal);
    const bool is_candidate =
        competes && !is_kept &&
        (key > merge.key ||
         (merge_equal && num_merge_equal + ties.before / kSecond < merge.num_equal));
    num_keep_equal += ties.total % kSecond;
    num_merge_equal += ties.total / kSecond;

    const Scan<int32_t> places = scan_of_cta<kSelectThreads>(
        (is_kept ? 1 : 0) + (is_candidate ? kSecond : 0), &shared.counts);
    if (is_kept) kept[num_kept + places.before % kSecond] = entry;
    if (is_candidate) {
      // Ascending keys are descending scores, then ascending entries.
      keys[num_candidates + places.before / kSecond] =
          static_cast<uint64_t>(~key) << 32 | static_cast<uint32_t>(entry);
    }
    num_kept += places.total % kSecond;
    num_candidates += places.total / kSecond;
    total_mass += score;
    if (is_kept) kept_mass += score;
  }
  for (int64_t i = budget + thread; i < p.kept_idx.length; i += kSelectThreads) kept[i] = -1;

  const int32_t length = sort_length(num_candidates);
  for (int32_t i = num_candidates + thread; i < length; i += kSelectThreads) keys[i] = kLastKey;
  if (thread == 0) shared.num_merged = num_candidates;
  device::sync_cta();
  if (num_candidates > 1) sort_keys<kSelectThreads>(keys, length);

  // At 1 there is no limit; comparing would let rounding drop the last entries.
  if (p.mass_limit < 1 && num_candidates > 0) {
    const double limit_mass =
        p.mass_limit * scan_of_cta<kSelectThreads>(total_mass, &shared.masses).total;
    const double kept_total = scan_of_cta<kSelectThreads>(kept_mass, &shared.masses).total;
    const int32_t per_thread = (num_candidates + kSelectThreads - 1) / kSelectThreads;
    const int32_t first =
        thread * per_thread < num_candidates ? thread * per_thread : num_candidates;
    const int32_t end = first + per_thread < num_candidates ? first + per_thread : num_candidates;
    double own = 0;
    for (int32_t i = first; i < end; ++i) own += scores[static_cast<uint32_t>(keys[i])];
    double mass = kept_total + scan_of_cta<kSelectThreads>(own, &shared.masses).before;
    for (int32_t i = first; i < end; ++i) {
      mass += scores[static_cast<uint32_t>(keys[i])];
      if (mass > limit_mass) {
        device::min_shared(&shared.num_merged, i);
        break;
      }
    }
    device::sync_cta();
  }
  const int32_t num_merged = shared.num_merged;
  for (int64_t i = thread; i < p.merge_idx.length; i += kSelectThreads) {
    merged[i] = i < num_merged ? static_cast<int32_t>(static_cast<uint32_t>(keys[i])) : -1;
  }
}

}  // namespace ems
