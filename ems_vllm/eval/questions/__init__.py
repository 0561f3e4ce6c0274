# SPDX-License-Identifier: Apache-2.0
"""Questions: tasks, what they are written from, and where a question stands in a prompt."""
