# SPDX-License-Identifier: Apache-2.0
"""What methods there are, what each needs, and what was measured of it."""
