# SPDX-License-Identifier: Apache-2.0
"""What `make gpu-pack` runs, on the machine that has a network."""
