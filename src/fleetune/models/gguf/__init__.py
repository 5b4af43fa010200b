# SPDX-License-Identifier: Apache-2.0
"""Read GGUF files: header, tokenizer, tensors."""
