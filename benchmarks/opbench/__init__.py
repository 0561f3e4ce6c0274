# SPDX-License-Identifier: Apache-2.0
"""Parts of bench_ops.py: shapes, timing, ceilings, what is timed, and the report."""
