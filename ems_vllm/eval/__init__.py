# SPDX-License-Identifier: Apache-2.0
"""Quality beside memory and speed: tasks run against an OpenAI endpoint, and their report."""
