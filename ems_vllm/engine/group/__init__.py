# SPDX-License-Identifier: Apache-2.0
"""One KV-cache group on a worker: its tensors, its requests, its compactions."""
