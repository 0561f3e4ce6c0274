// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cmath>
#include <cstdint>

#include "ems/macros.h"

namespace ems {

// Logarithm of how many times its centre's attention a class receives: the weight of all entries
// over the centre's, at most the number of entries, so that a centre with little weight of its own
// does not outgrow what it stands for. total_weight is > 0, centre_weight may be 0.
EMS_HOST_DEVICE inline float log_mass(float centre_weight, float total_weight,
                                      int64_t num_members) {
  const float ratio = total_weight / centre_weight;
  const float bound = static_cast<float>(num_members + 1);
  return logf(ratio < bound ? ratio : bound);
}

}  // namespace ems
