// SPDX-License-Identifier: Apache-2.0

#include <host/on_device.h>

#include "checks.h"
#include "ops.h"

namespace ems {

void select_entries(const Tensor& scores, const Tensor& num_entries, const Tensor& budgets,
                    const Tensor& num_protected, const Tensor& merge_limits, double mass_limit,
                    const Tensor& kept_idx, const Tensor& merge_idx) {
  const ArgumentChecks checks("select_entries", scores);
  SelectEntriesParams p{};
  checks.tensor("scores", scores, ScalarType::Float, {kAny, kAny, kAny, kAny});
  p.num_layers = scores.size(0);
  p.num_rows = scores.size(1);
  p.num_kv_heads = scores.size(2);
  p.scores = checks.head_rows<const float>("scores", scores, ScalarType::Float, p.num_layers,
                                           p.num_rows, p.num_kv_heads);
  p.num_entries = checks.row_values("num_entries", num_entries, p.num_rows);
  p.budgets = checks.row_values("budgets", budgets, p.num_rows);
  p.num_protected = checks.row_values("num_protected", num_protected, p.num_rows);
  p.merge_limits = checks.row_values("merge_limits", merge_limits, p.num_rows);
  p.mass_limit = mass_limit;
  p.kept_idx = checks.head_rows<int32_t>("kept_idx", kept_idx, ScalarType::Int, p.num_layers,
                                         p.num_rows, p.num_kv_heads);
  p.merge_idx = checks.head_rows<int32_t>("merge_idx", merge_idx, ScalarType::Int, p.num_layers,
                                          p.num_rows, p.num_kv_heads);
  on_device(
      checks, [&] { cpu::select_entries(p); },
      [&](const cuda::Stream& stream) { cuda::select_entries(p, stream); });
}

}  // namespace ems
