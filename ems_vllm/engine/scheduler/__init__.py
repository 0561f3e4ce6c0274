# SPDX-License-Identifier: Apache-2.0
"""The scheduler: decides what is compacted, scored and recorded, and which blocks are free."""

# The compressing schedulers, without and with asynchronous scheduling.
SCHEDULERS = (
    "ems_vllm.engine.scheduler.schedulers.CompressingScheduler",
    "ems_vllm.engine.scheduler.schedulers.CompressingAsyncScheduler",
)
