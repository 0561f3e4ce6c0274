// SPDX-License-Identifier: Apache-2.0
#pragma once

// The package's own, which tests/emulation/include would hide.
#include "../../../../csrc/host/on_device.h"
