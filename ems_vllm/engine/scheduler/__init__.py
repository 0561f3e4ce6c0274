# SPDX-License-Identifier: Apache-2.0
"""The scheduler, in the engine core: what is compacted, scored and recorded, and whose blocks are free."""
