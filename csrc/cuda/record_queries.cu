// SPDX-License-Identifier: Apache-2.0

#include "cuda/kernel_dispatch.h"
#include "ems/launch.cuh"
#include "ems/record_queries.cuh"
#include "launchers.h"

namespace ems::cuda {

void record_queries(const RecordQueriesParams& p, const Stream& stream) {
  constexpr const char* kOp = "record_queries";
  dispatch_dtype(p.dtype, [&](auto element) {
    using T = decltype(element);
    check_alignment<T>(kOp, "query", p.query.data, p.query.token_stride, p.query.head_stride,
                       p.head_size);
    check_alignment<T>(kOp, "ring", p.ring.data, p.ring.row_stride, p.ring.place_stride,
                       p.ring.head_stride);
    launch(kOp, record_queries_kernel<T>, {p.num_tokens}, kRecordThreads, 0, stream.handle, p);
  });
}

}  // namespace ems::cuda
