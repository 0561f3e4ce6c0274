# SPDX-License-Identifier: Apache-2.0
"""Parts of gpu_check.py. All but what its stages run need nothing beside Python."""
