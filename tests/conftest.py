"""Settings for every test: nothing is fetched, nothing needs a screen, a test process uses one core."""

import os

# Pages that tests/test_strange_pages.py adds to a copy of the zoo; they are at home only there.
collect_ignore = ["strange_pages"]

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402 (after the variables that it reads)

torch.set_num_threads(1)
