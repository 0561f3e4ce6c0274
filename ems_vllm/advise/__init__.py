# SPDX-License-Identifier: Apache-2.0
"""`ems-vllm advise`: a budget for the user's own traffic, by arithmetic and on a sample."""
