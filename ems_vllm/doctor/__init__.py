# SPDX-License-Identifier: Apache-2.0
"""The command `ems-vllm doctor`: whether compression can start here, and whether it would help."""
