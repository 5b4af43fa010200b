# SPDX-License-Identifier: Apache-2.0
"""Run a model whose weights stay in their file, which is mapped read-only: a GGUF file or safetensors."""
