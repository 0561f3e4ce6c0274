# SPDX-License-Identifier: Apache-2.0
"""What happens to the entries that do not stay."""
