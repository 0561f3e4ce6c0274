// SPDX-License-Identifier: Apache-2.0

#include <host/on_device.h>

#include "checks.h"
#include "ops.h"

namespace ems {

void rank_entries(const Tensor& scores, const Tensor& num_entries, const Tensor& num_protected,
                  const std::optional<Tensor>& is_protected, double share, int64_t first,
                  const Tensor& weights) {
  const ArgumentChecks checks("rank_entries", scores);
  RankEntriesParams p{};
  checks.tensor("scores", scores, ScalarType::Float, {kAny, kAny, kAny, kAny});
  p.num_layers = scores.size(0);
  p.num_rows = scores.size(1);
  p.num_kv_heads = scores.size(2);
  p.scores = checks.head_rows<const float>("scores", scores, ScalarType::Float, p.num_layers,
                                           p.num_rows, p.num_kv_heads);
  p.num_entries = checks.row_values("num_entries", num_entries, p.num_rows);
  p.num_protected = checks.row_values("num_protected", num_protected, p.num_rows);
  if (is_protected.has_value()) {
    p.is_protected = checks.head_rows<const bool>("is_protected", *is_protected, ScalarType::Bool,
                                                  p.num_layers, p.num_rows, p.num_kv_heads);
    checks.same_length("is_protected", *is_protected, "scores", scores);
  }
  checks.require(share > 0, "share must be more than 0, got ", share);
  checks.require(first >= 0, "first must be at least 0, got ", first);
  p.share = static_cast<float>(share);
  p.first = static_cast<float>(first);
  p.weights = checks.head_rows<float>("weights", weights, ScalarType::Float, p.num_layers,
                                      p.num_rows, p.num_kv_heads);
  checks.same_length("weights", weights, "scores", scores);
  on_device(
      checks, [&] { cpu::rank_entries(p); },
      [&](const cuda::Stream& stream) { cuda::rank_entries(p, stream); });
}

}  // namespace ems
