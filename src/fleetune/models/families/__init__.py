# SPDX-License-Identifier: Apache-2.0
"""Handle what differs between model families: block widths, rotary embeddings, Gemma's norms and windows."""
