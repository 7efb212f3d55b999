"""What the machine has (device, memory) and what a run took of it (time, memory)."""

import ctypes
import sys
import time
from pathlib import Path

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
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise UserError(f"device {name!r} is not on this machine; try --device cpu") from None
    return device


def available_memory(device):
    """Bytes that can still be had on the device, or None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None


def peak_memory(device):
    """The most bytes this process has held: of the GPU where it computed, otherwise of the main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
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
