# SPDX-License-Identifier: Apache-2.0
"""Whether a server can start with given arguments: without weights, and without one that runs.

Here vLLM is imported, in functions: `ems-vllm --help` must not wait for it.
"""
