# SPDX-License-Identifier: Apache-2.0
"""vLLM's workers with compression mixed in; chosen by `engine.activation`."""
