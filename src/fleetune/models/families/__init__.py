"""Handle what differs between model families: a table of them for GGUF, block widths, rotary embeddings, experts."""
