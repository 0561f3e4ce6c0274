# SPDX-License-Identifier: Apache-2.0
"""The API server's process: flags, start-up checks, checks of requests."""
