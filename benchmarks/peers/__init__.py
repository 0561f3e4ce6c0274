# SPDX-License-Identifier: Apache-2.0
"""Other libraries' methods on our prompts: same model, tokens, budgets and seeds."""
