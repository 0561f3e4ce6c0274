# SPDX-License-Identifier: Apache-2.0
"""The API server: flags, what is refused at start-up, and the checks of a request."""
