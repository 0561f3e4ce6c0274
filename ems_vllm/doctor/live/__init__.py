# SPDX-License-Identifier: Apache-2.0
"""What limits a running server, by its `/metrics` alone; vLLM need not be installed here."""
