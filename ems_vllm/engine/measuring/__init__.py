# SPDX-License-Identifier: Apache-2.0
"""What an evaluation asks of a server beside answers."""
