# SPDX-License-Identifier: Apache-2.0
"""The one place that holds the version; pyproject.toml and setup.py read it."""

__version__ = "0.1.0"
