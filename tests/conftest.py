"""Settings for every test: nothing is fetched, nothing needs a screen, a test process uses one core.

A shell that starts the suite in the background has it ignore Ctrl-C, and its children too. Some tests send
Ctrl-C, so it works again here, and so in every child.

ZOO_CPU=avx2 python -m pytest      as on a processor with AVX2 alone (models/utils/machine.py)
"""

import os
import signal

# Pages that tests/test_strange_pages.py adds to a copy of the zoo; they are at home only there.
collect_ignore = ["strange_pages"]

signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"
os.environ.setdefault("OMP_NUM_THREADS", "1")

# What makes torch, oneDNN and MKL do without the instructions that ZOO_CPU takes away.
THEIR_NAMES = {
    "avx2": ("avx2", "AVX2", "AVX2"),
    "avx_vnni": ("avx2", "AVX2_VNNI", "AVX2"),
    "avx512": ("avx512", "AVX512_CORE", "AVX512"),
    "avx512_vnni": ("avx512", "AVX512_CORE_VNNI", "AVX512"),
}
if os.environ.get("ZOO_CPU") in THEIR_NAMES:
    names = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")
    os.environ |= dict(zip(names, THEIR_NAMES[os.environ["ZOO_CPU"]]))

import torch  # noqa: E402 (after the variables that it reads)

torch.set_num_threads(1)

from tests.browser import browser, driver  # noqa: E402, F401 (fixtures)
