"""Products with fp32 matrices on a CPU: F.linear's sums, by whichever of torch's two libraries is faster.

On x86 torch gives products in bf16 to oneDNN, and in fp32 to MKL. Where this was measured, oneDNN is faster
in fp32 too, for a single row as for many. Milliseconds for 768 x 3072, each of 24 matrices in turn, so that
they are read from memory (two cores of an AMD EPYC with AVX-512, torch 2.13):

    rows of x                  1      2      5      8     32    128    512
    F.linear                 .76   1.50   1.08    .98   1.57   4.76  13.50
    F.linear, by columns     .51    .83   1.03   1.05   1.62   4.80  13.31
    oneDNN                   .38    .46    .55    .62   1.11   3.22  11.46

But oneDNN needs about 10 us to begin. So matrices of less than a megabyte stay with F.linear, stored column
by column, the order that it reads faster for a single row.

The operator is the one that Inductor puts into what it compiles. It has no gradient: while autograd records,
and while a compiler traces the layer, that layer is F.linear.
Proof: tests/test_onednn.py, against F.linear; `python benchmark.py`.
"""

import torch
import torch.nn.functional as F
from torch import nn

from models.utils.quantize import set_module

SMALLEST = 2**18  # numbers in a matrix for oneDNN, a megabyte


class Linear(nn.Module):
    """In the place of torch's Linear or transformer_lm's, with its parameters."""

    def __init__(self, linear):
        super().__init__()
        self.weight, self.bias = linear.weight, getattr(linear, "bias", None)

    def forward(self, x):
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return F.linear(x, self.weight, self.bias)
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


@torch.no_grad()
def choose_products(model):
    """Give each fp32 matrix on the CPU, of a model that is loaded, the faster library or order in memory."""
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return
    for name, module in list(model.named_modules()):
        if type(module).__name__ != "Linear":
            continue
        weight = module.weight
        if weight.dtype != torch.float32 or weight.device.type != "cpu":
            continue
        if weight.numel() >= SMALLEST:
            set_module(model, name, Linear(module))
        else:
            weight.data = weight.data.T.contiguous().T
