"""The proof of what models/utils/machine.py asks of the system; the rest of it is in tests/test_run.py."""

import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import save_file

from models.utils import machine
from models.utils.errors import UserError
from models.utils.machine import choose_dtype, instructions, training_dtype
from models.utils.safetensors_files import SafetensorsFile

CPU, GPU = torch.device("cpu"), torch.device("cuda")
FLAGS = {"avx2": True, "avx512_bw": True, "avx512_vnni": True, "avx512_bf16": True, "amx_bf16": False}


@pytest.fixture
def server(monkeypatch):
    """A processor with the instructions of FLAGS, for which oneDNN multiplies bf16."""
    monkeypatch.delenv("ZOO_CPU", raising=False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: FLAGS)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)


def test_a_variable_takes_the_newer_instructions_away(server, monkeypatch):
    assert instructions() == ["avx2", "avx512", "avx512_vnni", "avx512_bf16"]
    monkeypatch.setenv("ZOO_CPU", "avx512")
    assert instructions() == ["avx2", "avx512"]
    monkeypatch.setenv("ZOO_CPU", "avx1024")
    with pytest.raises(UserError, match="ZOO_CPU is 'avx1024'; give one of avx2, avx_vnni, avx512,"):
        instructions()
    # A laptop's processor has the dot product without AVX-512.
    monkeypatch.setitem(FLAGS, "avx_vnni", True)
    monkeypatch.setenv("ZOO_CPU", "avx_vnni")
    assert instructions() == ["avx2", "avx_vnni"]
    monkeypatch.setenv("ZOO_CPU", "avx2")
    assert instructions() == ["avx2"]


def test_a_cpu_runs_and_trains_in_the_dtype_that_it_is_fast_at(server, monkeypatch):
    half, single = torch.bfloat16, torch.float32
    assert choose_dtype(half, CPU, 10, 100) == (half, None) == training_dtype(CPU)
    for level in ("avx512_vnni", "avx2"):
        monkeypatch.setenv("ZOO_CPU", level)
        dtype, line = choose_dtype(half, CPU, 50, 100)
        assert dtype == single and f"{level}) has no instructions for bfloat16" in line
        assert "--dtype bfloat16 takes half the memory" in line
        dtype, line = choose_dtype(half, CPU, 51, 100)
        assert dtype == half and line.startswith("bfloat16") and "needs 51 bytes of the 100 bytes" in line
        assert training_dtype(CPU)[0] == single and level in training_dtype(CPU)[1]
        assert choose_dtype(single, CPU, 10, 100) == (single, None)
        assert choose_dtype(half, GPU, 10, 100) == (half, None) == training_dtype(GPU)


def test_fp16_has_instructions_of_its_own_and_onednn_may_be_told_to_do_without(server, monkeypatch):
    assert choose_dtype(torch.float16, CPU, 10, 100)[0] == torch.float32
    monkeypatch.setitem(FLAGS, "avx512_fp16", True)
    assert choose_dtype(torch.float16, CPU, 10, 100) == (torch.float16, None)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    assert training_dtype(CPU)[0] == torch.float32


def test_the_system_says_how_much_memory_there_is():
    there = machine.psutil.virtual_memory().total
    assert 50e6 < machine.available_memory(CPU) < there
    block = torch.ones(50_000_000)
    assert block.nbytes < machine.peak_memory(CPU) < there


PROGRAM = """
import resource, torch
from models.utils.machine import keep_freed_memory

def layers():
    for _ in range(10):
        torch.empty(10_000_000).fill_(1.0)  # 40 MB, free again at once

def page_faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    layers()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

layers()
print(page_faults(), keep_freed_memory(), layers() or page_faults())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="speaks of glibc")
def test_freed_memory_is_not_fetched_again():
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=Path(__file__).parent.parent, capture_output=True, text=True
    )
    before, kept, after = run.stdout.split()
    if kept == "False":
        pytest.skip("this system has another libc")
    assert int(before) > 100
    assert int(after) < int(before) / 2


@pytest.mark.skipif(sys.platform != "linux", reason="what is given back, and how, is Linux's")
def test_mapped_memory_is_given_back(tmp_path):
    """32 MB that were read are no longer with the process; and whoever reads them again finds them."""
    save_file({"x": torch.ones(8 * 2**20)}, tmp_path / "x.safetensors")
    tensor, process = SafetensorsFile(tmp_path / "x.safetensors").read("x"), psutil.Process()
    before = process.memory_info().rss
    assert tensor.sum() == 8 * 2**20
    assert process.memory_info().rss - before > 24e6
    machine.give_back(tensor)
    assert process.memory_info().rss - before < 12e6
    assert tensor.sum() == 8 * 2**20
