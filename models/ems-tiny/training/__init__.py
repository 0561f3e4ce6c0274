# SPDX-License-Identifier: Apache-2.0
"""Training of the small model that is shipped with the project."""
