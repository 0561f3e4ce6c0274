# SPDX-License-Identifier: Apache-2.0
"""Servers: started, asked and measured until every question of a run has an answer."""
