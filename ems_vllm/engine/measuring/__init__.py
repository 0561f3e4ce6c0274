# SPDX-License-Identifier: Apache-2.0
"""For evaluations: what a server is asked for beside answers."""
