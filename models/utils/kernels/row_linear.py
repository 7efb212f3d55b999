"""A few rows times a matrix in fp32 or bf16, at the speed of memory: what F.linear is not made for.

    out = row_linear(x, weight)      F.linear for up to 32 rows on the CPU, to run a model, not to train it

A matrix product for many rows cuts x and the weight into blocks that fit into the core's caches, and copies
them into an order in which every number that is loaded is used many times. With a few rows there is nothing
to gain from that, since each weight is used once per row and that is all; the copies remain. row_linear.cpp
reads the weight where it lies, and does no more than must be done:

    for each output n:                         a row of the weight
        sums = 0                               for each row of x, 8 sums side by side
        for k in steps of 8 or 16:
            ask for the weights 16 KB ahead
            load weights w[n, k ...]           once, for all rows of x
            for each row m: sums[m] += weights * x[m, k ...]
        out[m, n] = the sum of the 8

Up to 8 rows share a weight that is loaded; for the next 8 the weights of 16 outputs are still in the core's
cache.

Three things make it fast, and each was found by measuring. The weight is read from its start to its end: two
or four outputs at a time would load each x for all of them once, but read a third slower, because memory
likes one long read best. Rows of x share what is loaded, so that five take little longer than one:
speculative sampling lives on that. And where there is much to compute between two loads, a core no longer
sees far enough ahead to keep the memory busy; so weights are asked for 16 KB in advance.

The table is for one matrix of 2048 x 768, a hundred of them in turn, in huge pages (tiled_linear.py), on 2
cores of an AMD EPYC (Zen 5) whose memory gives 40 to 60 GB/s: as it is, with AVX-512 and its bf16 products
(which F.linear uses too), and as if it had AVX2 alone (ZOO_CPU=avx2):

    rows of x                              1      2      5      8     16     32
    AVX-512  fp32  milliseconds          .15    .15    .15    .15    .27    .53
                   F.linear              .38    .62    .42    .42    .54    .77
             bf16  milliseconds          .13    .13    .16    .16    .20    .42      memory at 33 GB/s by then
                   F.linear              .29    .28    .33    .35    .33    .49
    AVX2     fp32  milliseconds          .14    .14    .14    .15    .28    .52      45 GB/s with one row
                   F.linear              .36    .57    .43    .42    .52    .75
             bf16  milliseconds          .08    .08    .09    .14    .27    .53
                   F.linear              .07    .13    .31    .51   1.07   2.03

Of several matrices, the experts of a layer (stacked_experts.py), each row of x has its own. Rows are sorted
by matrix, so that those of one share what is loaded; the matrices that no row asks for are not touched.

Sums are in fp32; bf16 is widened to it, or multiplied by an instruction that takes pairs of bf16 as they are.
Shapes: N outputs and K inputs of a matrix; n, k and m number outputs, inputs and rows of x.
Proof: tests/test_row_linear.py.
"""

from pathlib import Path

import torch
from torch import Tensor

from models.utils.kernels.cpp_library import load_library

SOURCE = Path(__file__).with_suffix(".cpp")
INPUTS = 32  # a row of the weight has a multiple of these
MAX_ROWS = 32  # of x; more of them are faster in F.linear


def linear_fits(x: Tensor, weight: Tensor) -> bool:
    """Whether F.linear(x, weight) is a product for the kernel, and the kernel is there."""
    return x.numel() <= MAX_ROWS * weight.shape[1] and matrix_fits(x, weight)


def matrix_fits(x: Tensor, weight: Tensor) -> bool:
    """The same of a matrix, or of several, however many rows x has."""
    K = weight.shape[-1]
    known = x.dtype == weight.dtype and x.dtype in (torch.float32, torch.bfloat16)
    lies_well = weight.device.type == "cpu" and weight.stride()[-2:] == (K, 1)
    return K % INPUTS == 0 and known and lies_well and load_row_linear() is None


def row_linear(x: Tensor, weight: Tensor, bias=None, to_fp32=False, experts=None) -> Tensor:
    """F.linear; x (..., K), weight (N, K), which linear_fits() has seen; to_fp32: the sums as they are.

    experts (r,): row n of x (r, K) goes through matrix experts[n] of weight (E, N, K) instead.
    """
    return torch.ops.zoo.row_linear(x, weight, bias, False, to_fp32, experts)


def load_row_linear():
    """Make torch.ops.zoo.row_linear known, built on first use; None, or why it cannot be used."""
    return load_library(SOURCE, shape_of)


def shape_of(x, weight, bias=None, plain=False, to_fp32=False, experts=None):
    return x.new_empty(*x.shape[:-1], weight.shape[-2], dtype=torch.float32 if to_fp32 else x.dtype)
