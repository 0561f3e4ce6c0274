# SPDX-License-Identifier: Apache-2.0
"""Serving benchmark: start a server, load it, watch its block pool, sum up, report."""
