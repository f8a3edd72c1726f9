"""What holds for every test: no network, few threads, no reports sent anywhere."""

from __future__ import annotations

import os

# Before anything imports torch or a library of the hub: a limit set later would not reach them.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("WANDB_MODE", "disabled")
os.environ["COLUMNS"] = "120"  # what is printed is laid out for a terminal of this width
