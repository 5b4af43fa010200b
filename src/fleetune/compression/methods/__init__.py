"""One file per paper; `compression/methods/llm_pruner.py` is `--method llm-pruner`."""
