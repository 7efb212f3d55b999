"""Weights in FP8 with a scale for each block of 128 x 128, as DeepSeek-V3 is published; they become bf16.

Beside a matrix `weight` (N, K), a byte a number, stands `weight_scale_inv` (N / 128, K / 128, rounded up):
what the numbers of each block are multiplied by. Blocks at the right and at the bottom may be smaller. A
number in e4m3 has 4 significant bits and a scale 24; bf16 keeps 8 of their product's.
Source: README_WEIGHTS.md of the published files. Proof: tests/test_fp8.py.
"""

from math import ceil

import torch

from conversion.match import stop_if

BLOCK = 128
E4M3 = ("F8_E4M3", torch.float8_e4m3fn)  # in a header of safetensors, and in a pickle
ENDING = "_scale_inv"


class BlockScaled:
    """The files of a checkpoint as if they held bf16: `entries` without the scales, `read` multiplies."""

    def __init__(self, files, folder):
        self.files = files
        self.scaled = {name for name, entry in files.entries.items() if entry.dtype in E4M3}
        stop_if(self.problems(), folder)
        self.entries = {
            name: entry._replace(dtype=torch.bfloat16) if name in self.scaled else entry
            for name, entry in files.entries.items()
            if not name.endswith(ENDING)
        }

    def problems(self):
        """What keeps matrices and scales from belonging together, a phrase each."""
        entries, problems = self.files.entries, []
        for name in self.scaled:
            shape, scale = entries[name].shape, entries.get(name + ENDING)
            blocks = tuple(ceil(size / BLOCK) for size in shape)
            if len(shape) != 2:
                problems.append(f"{name} {shape} is FP8 and no matrix")
            elif scale is None:
                problems.append(f"{name + ENDING} {blocks} is missing; {name} is FP8")
            elif scale.shape != blocks:
                problems.append(
                    f"{name + ENDING} has shape {scale.shape}, where {name} {shape} asks for {blocks}"
                )
            elif scale.dtype != torch.float32:
                problems.append(f"{name + ENDING} is stored as {scale.dtype}, where float32 is expected")
        alone = [name for name in entries if name.endswith(ENDING)]
        alone = [name for name in alone if name.removesuffix(ENDING) not in self.scaled]
        return problems + [f"{name} has no matrix in FP8 that it is for" for name in alone]

    def read(self, name):
        stored = self.files.read(name)
        if name not in self.scaled:
            return stored
        scales, numbers = self.files.read(name + ENDING), torch.empty(stored.shape, dtype=torch.bfloat16)
        for n, row in enumerate(scales):  # of blocks; so that little is held in fp32
            strip = slice(n * BLOCK, (n + 1) * BLOCK)
            numbers[strip] = stored[strip].float() * row.repeat_interleave(BLOCK)[: stored.shape[1]]
        return numbers
