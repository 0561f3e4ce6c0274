// SPDX-License-Identifier: Apache-2.0
#pragma once

// Facts about this build that more than one translation unit must agree on.

// `#pragma GCC target` is what lets one portable binary hold several instruction sets. Other
// compilers build the portable variant only.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define EMS_X86_VARIANTS 1
#else
#define EMS_X86_VARIANTS 0
#endif
