// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "ems/params.h"

// The kernels behind the operators, one set per device. Arguments have been checked.
namespace ems::cpu {

void score_queries(const ScoreQueriesParams& params);
void score_window(const ScoreWindowParams& params);
void record_queries(const RecordQueriesParams& params);
void select_entries(const SelectEntriesParams& params);
void assign_classes(const AssignClassesParams& params);
void merge_compact(const MergeCompactParams& params);
void plan_metadata(const PlanMetadataParams& params);

}  // namespace ems::cpu
