"""Linear layers in fp32 on a CPU: which of torch's two libraries multiplies, and how the matrix lies.

On x86 F.linear gives a product in bf16 to oneDNN, and one in fp32 to MKL. On the processor where this was
measured (two cores of an AMD EPYC with AVX-512, torch 2.13) oneDNN is faster in fp32 too, for one row as for
many. Milliseconds per product, with 24 weights of 3072 x 768 in turn, so that each is read from memory:

    rows of x                  1      2      5      8     32    128    512
    F.linear                 .76   1.50   1.08    .98   1.57   4.76  13.50
    F.linear, by columns     .51    .83   1.03   1.05   1.62   4.80  13.31
    oneDNN                   .38    .46    .55    .62   1.11   3.22  11.46

(MKL does need longer for two rows than for five.) On one with AVX2 alone oneDNN was slower, a tenth for a
prompt and a sixth for a step; so where there is no AVX-512 everything stays as torch has it. A call of oneDNN
takes about 10 us before it multiplies. In a small model, whose matrices stay in the processor's caches, that
is more than it gains; so matrices of less than a megabyte stay with F.linear, and are stored column by
column, which is faster for one row.

Matrices in bf16 and fp16 are given to widened.py where the CPU is slow at them, and stay as they are
elsewhere.

The operator is torch's own, but an internal one: Inductor calls it in what it compiles. It has no gradient,
and while a compiler traces a layer, compile.py wants to see F.linear; in both cases the layer is F.linear.
Proof: tests/test_onednn.py, against F.linear; `python benchmark.py bert-base-uncased vit-b-16`.
"""

import torch
import torch.nn.functional as F
from torch import nn

from models.utils.kernels import widened
from models.utils.machine import instructions, is_slow

SMALLEST = 2**18  # numbers in a matrix for oneDNN: a megabyte


class Linear(nn.Module):
    """In the place of torch's Linear, or of transformer_lm's own, with the parameters of that one."""

    def __init__(self, linear):
        super().__init__()
        self.weight, self.bias = linear.weight, getattr(linear, "bias", None)

    def forward(self, x):
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or not x.is_cpu:
            return F.linear(x, self.weight, self.bias)
        # After the bias: what is done to the result ("none", no activation), with its two kinds of arguments.
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


def choose_products(model, by_columns=True):
    """Give each matrix on the CPU, of a model that is loaded, its library and its order in memory.

    by_columns: whether those that stay with F.linear may be stored column by column.
    """
    both = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    may_choose = both and "avx512" in instructions()
    for name, module in list(model.named_modules()):
        if type(module).__name__ != "Linear":  # torch's, or transformer_lm's own
            continue
        weight = module.weight
        if weight.device.type != "cpu":
            continue
        if is_slow(weight.dtype, weight.device):
            model.set_submodule(name, widened.Linear(module))
        elif weight.dtype != torch.float32 or not may_choose:
            continue
        elif weight.numel() >= SMALLEST:
            model.set_submodule(name, Linear(module))
        elif by_columns:
            weight.data = weight.data.T.contiguous().T
