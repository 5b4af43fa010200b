"""Read GGUF files: header, tokenizer, tensors."""
