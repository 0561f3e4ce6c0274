// SPDX-License-Identifier: Apache-2.0

#include "ems/launch.cuh"
#include "ems/shift_block_tables.cuh"
#include "launchers.h"

namespace ems::cuda {

void plan_metadata(const PlanMetadataParams& p, const Queue& queue) {
  launch("plan_metadata", plan_metadata_kernel, {p.num_rows}, kPlanThreads, 0, queue.stream, p);
}

}  // namespace ems::cuda
