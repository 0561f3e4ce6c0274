# SPDX-License-Identifier: Apache-2.0
"""Pages that are tables of the code, one module each; docs/generate.py writes them."""
