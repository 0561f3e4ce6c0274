# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels, compiled for the CPU over an emulator, as torch.ops.ems_vllm_emulated."""
