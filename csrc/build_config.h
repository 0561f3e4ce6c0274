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

// GCC knows tiles of AMX since 11, and Linux has to be asked for them.
#if EMS_X86_VARIANTS && defined(__linux__) && __GNUC__ >= 11
#define EMS_AMX_VARIANT 1
#else
#define EMS_AMX_VARIANT 0
#endif
