// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <functional>

#include "ems/params.h"

// The kernels behind the operators, one set per device. Arguments have been checked.
namespace ems::cpu {

void score_queries(const ScoreQueriesParams& params);
void score_window(const ScoreWindowParams& params);
void record_queries(const RecordQueriesParams& params);
void rank_entries(const RankEntriesParams& params);
void select_entries(const SelectEntriesParams& params);
void assign_classes(const AssignClassesParams& params);
void merge_compact(const MergeCompactParams& params);
void shift_block_tables(const ShiftBlockTablesParams& params);
void head_pages(const HeadPagesParams& params);
void vector_norms(const VectorNormsParams& params);
void key_moments(const KeyMomentsParams& params);
void key_scores(const KeyScoresParams& params);

}  // namespace ems::cpu

namespace ems::cuda {

// Where kernels run, and their scratch memory.
struct Stream {
  // Of type cudaStream_t.
  void* handle;
  // Returns device memory that stays valid for the work submitted until the launcher returns.
  std::function<void*(int64_t num_bytes)> allocate;
};

// Scratch memory that an operator over many heads asks for at a time, unless a single head needs
// more, or the heads that merge_compact has to read together; heads are processed in turns that
// fit. Small enough to stay in the second-level cache.
constexpr int64_t kMaxScratchBytes = 32 << 20;

// They return when the work is submitted; none waits for the device.
void score_queries(const ScoreQueriesParams& params, const Stream& stream);
void score_window(const ScoreWindowParams& params, const Stream& stream);
void record_queries(const RecordQueriesParams& params, const Stream& stream);
void rank_entries(const RankEntriesParams& params, const Stream& stream);
void select_entries(const SelectEntriesParams& params, const Stream& stream);
void assign_classes(const AssignClassesParams& params, const Stream& stream);
void merge_compact(const MergeCompactParams& params, const Stream& stream);
void shift_block_tables(const ShiftBlockTablesParams& params, const Stream& stream);
void head_pages(const HeadPagesParams& params, const Stream& stream);
void vector_norms(const VectorNormsParams& params, const Stream& stream);
void key_moments(const KeyMomentsParams& params, const Stream& stream);
void key_scores(const KeyScoresParams& params, const Stream& stream);

}  // namespace ems::cuda
