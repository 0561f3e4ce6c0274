// SPDX-License-Identifier: Apache-2.0

#include "ems/head_pages.cuh"
#include "ems/launch.cuh"
#include "launchers.h"

namespace ems::cuda {

void head_pages(const HeadPagesParams& p, const Stream& stream) {
  launch("head_pages", head_pages_kernel, {p.num_rows, p.num_kv_heads}, kHeadPagesThreads, 0,
         stream.handle, p);
}

}  // namespace ems::cuda
