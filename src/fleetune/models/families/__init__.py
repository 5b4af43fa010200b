# SPDX-License-Identifier: Apache-2.0
"""What differs between model families: widths, rotary embeddings, names of tensors."""
