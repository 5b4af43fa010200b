# SPDX-License-Identifier: Apache-2.0
"""One file per paper; `compression/methods/llm_pruner.py` is `--method llm-pruner`."""
