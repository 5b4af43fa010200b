# SPDX-License-Identifier: Apache-2.0
"""One thread for the tiny models, and a cache of their own: tests touch nothing of the user's."""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parent / "contract"))
