"""What the machine has (device, instructions, memory) and what a run took of it (time, memory)."""

import ctypes
import mmap
import os
import sys
import time
from contextlib import suppress

import psutil
import torch

from models.utils.errors import UserError


def dtype_named(name):
    """The torch.dtype of that name; None for None."""
    return name and getattr(torch, name)


def choose_device(name=None):
    """The torch.device called `name`, checked to be there; without a name the best one: cuda, mps, cpu."""
    if name is None:
        best = [kind for kind in ("cuda", "mps") if getattr(torch, kind).is_available()]
        return torch.device(best[0] if best else "cpu")
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda", "mps"):
            raise NotImplementedError
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise UserError(f"device {name!r} is not on this machine; try --device cpu") from None
    return device


# Instructions -----------------------------------------------------------------------------------------------

# What a processor may have that makes matrix products faster, from the oldest to the newest, and what torch
# calls it. ZOO_CPU=avx2 in the environment, say, means: as if it had nothing of this list after avx2.
INSTRUCTIONS = {
    "avx2": "avx2",
    "avx_vnni": "avx_vnni",
    "avx512": "avx512_bw",
    "avx512_vnni": "avx512_vnni",
    "avx512_bf16": "avx512_bf16",
    "avx512_fp16": "avx512_fp16",
    "amx_bf16": "amx_bf16",
    "amx_fp16": "amx_fp16",
    "neon": "neon",
    "arm_fp16": "fp16_arith",
    "arm_bf16": "bf16",
}
MULTIPLIES = {
    torch.bfloat16: {"avx512_bf16", "amx_bf16", "arm_bf16"},
    torch.float16: {"avx512_fp16", "amx_fp16", "arm_fp16"},
}


def instructions():
    """Those of INSTRUCTIONS that this processor has and the environment allows, as a list of names.

    The kernels of this project and the choice of a dtype go by it. torch's own products go by variables of
    their own: ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2.
    """
    there, names, last = torch.cpu.get_capabilities(), list(INSTRUCTIONS), os.environ.get("ZOO_CPU")
    if last and last not in names:
        raise UserError(f"ZOO_CPU is {last!r}; give one of {', '.join(names)}, or unset it")
    allowed = names[: names.index(last) + 1] if last else names
    return [name for name in allowed if there.get(INSTRUCTIONS[name])]


def spoken_instructions():
    return " ".join(instructions()) or "no vector instructions"


def is_slow(dtype, device):
    """Whether a CPU multiplies matrices of this dtype several times as slowly as those of fp32.

    It does where it lacks the instruction. Seconds of one core for 512 rows times 48 matrices of 3072 x 768:
    fp32 .49, bf16 .25 with the instruction, 1.4 with AVX-512 and without it, 4.5 with AVX2 alone (fp32 .96).
    """
    if device.type != "cpu" or dtype not in MULTIPLIES:
        return False
    # oneDNN, which multiplies bf16 for torch, may be told to do without (ONEDNN_MAX_CPU_ISA).
    told = dtype == torch.bfloat16 and torch.backends.mkldnn.is_available()
    refused = told and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return refused or not MULTIPLIES[dtype].intersection(instructions())


def choose_dtype(stored, device, fp32_bytes, available):
    """(dtype, line): what a model runs in if nobody says --dtype, and a line that says why, or None.

    That of the checkpoint, `stored`, or fp32 where the CPU is slow at it and has the memory: fp32_bytes, what
    weights and cache take in fp32, may be half of the bytes that are `available`.
    """
    if not is_slow(stored, device):
        return stored, None
    name = str(stored).removeprefix("torch.")
    slow = f"this CPU ({spoken_instructions()}) has no instructions for {name}, and is faster in float32"
    if fp32_bytes <= available / 2:
        return torch.float32, f"float32: {slow}; --dtype {name} takes half the memory"
    needs, free = spoken_bytes(fp32_bytes), spoken_bytes(available)
    return stored, f"{name}: {slow}, but that needs {needs} of the {free} that are free"


def training_dtype(device):
    """(dtype, line): what training multiplies in if nobody says, and a line that says why, or None."""
    if not is_slow(torch.bfloat16, device):
        return torch.bfloat16, None
    slow = f"this CPU ({spoken_instructions()}) has no instructions for bfloat16"
    return torch.float32, f"float32: {slow}, and is faster so"


# Memory -----------------------------------------------------------------------------------------------------


def available_memory(device):
    """Bytes that can still be had on the device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def peak_memory(device):
    """The most bytes this process has held: of the GPU where it computed, otherwise of the main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:
        return psutil.Process().memory_info().peak_wset  # Windows
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def spoken_bytes(count):
    """1,234,567 -> "1.2 MB"."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB"


class Stopwatch:
    """Times a generation: start it before the prefill, call `token` at each new one."""

    def __init__(self):
        self.start = time.perf_counter()
        self.first = self.last = None
        self.num_tokens = 0

    def token(self, token=None):
        self.last = time.perf_counter()
        self.first = self.first or self.last
        self.num_tokens += 1

    def timings(self, device):
        """The figures; the speed is that of the tokens after the first, which paid for the prompt."""
        seconds = self.last - self.first if self.num_tokens > 1 else None
        return {
            "num_tokens": self.num_tokens,
            "seconds_to_first_token": self.first - self.start if self.num_tokens else None,
            "tokens_per_second": (self.num_tokens - 1) / seconds if seconds else None,
            "peak_memory_bytes": peak_memory(device),
        }

    def line(self, device):
        """The figures as a line for a person."""
        figures = self.timings(device)
        parts = [f"{self.num_tokens} tokens"]
        if figures["tokens_per_second"]:
            parts.append(f"{figures['tokens_per_second']:.1f} tokens/s")
        if figures["seconds_to_first_token"] is not None:
            parts.append(f"first token after {figures['seconds_to_first_token']:.2f} s")
        return ", ".join([*parts, f"peak memory {spoken_bytes(figures['peak_memory_bytes'])}"])


def give_back(tensor):
    """Let the system have the memory of a tensor that is mapped from a file and will not be read again.

    Its pages stay with the process otherwise, as long as any of the file is mapped. Elsewhere than on Linux
    nothing happens.
    """
    MADV_DONTNEED = 4  # sys/mman.h
    begin = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if sys.platform == "linux" and end > begin:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), MADV_DONTNEED)


def give_back_freed():
    """Let the system have what was freed between blocks that are still in use, where glibc knows how."""
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def keep_freed_memory():
    """Let the process keep memory that it frees, for the next layer; whether that could be arranged.

    A layer's results are tens of megabytes, free again a moment later. glibc gives such blocks back to the
    system and fetches them anew for the next layer, page by page and filled with zeros: up to a tenth of a
    prefill. Programs call this at their start. Elsewhere than on Linux with glibc nothing happens.
    """
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return all(mallopt(parameter, 2**31 - 1) == 1 for parameter in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD))
