# SPDX-License-Identifier: Apache-2.0
"""What the model is trained on: generators by family, and the batches made of them."""
