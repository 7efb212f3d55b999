"""The last product in fp32, so that no two tokens tie that ought not to.

A bf16 keeps 8 bits: between 16 and 32 its numbers stand 0.125 apart. So logits that are rounded to it tie: in
8 of 100 places two tokens shared the top (SmolLM2-135M-Instruct), and which of them was picked, greedily, was
their order in the vocabulary. The sums of a product are made in fp32 anyway; a head keeps them, and nothing
ties any more. The weights stay bf16, and as many bytes are read.

torch has no such product on a CPU. row_linear.py has, and takes half of the time that torch does; it is asked
where its library was built already, by --compile. Elsewhere widened.py makes the matrix fp32, part by part: a
tenth more time for a step of 124 M weights.

A head that was quantized answers as its kernel does, in the dtype of its input.
Shapes: N outputs, K inputs.
Proof: tests/test_head.py, against the product in fp64.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.utils.kernels.cpp_library import is_built
from models.utils.kernels.row_linear import SOURCE, linear_fits, row_linear
from models.utils.kernels.widened import widened_product


class Head(nn.Module):
    """In the place of a linear layer in bf16 or fp16, with its parameters; the result is fp32."""

    def __init__(self, linear):
        super().__init__()
        self.weight, self.bias = linear.weight, getattr(linear, "bias", None)

    def forward(self, x: Tensor) -> Tensor:
        return product_in_fp32(x, self.weight, self.bias)


def product_in_fp32(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear with a result in fp32: x (..., K), weight (N, K), bias (N,) -> (..., N)."""
    if not torch.is_grad_enabled() and is_built(SOURCE) and linear_fits(x, weight):
        return row_linear(x, weight, bias, to_fp32=True)
    rows = x.reshape(-1, x.shape[-1])
    if x.is_cuda and not torch.is_grad_enabled():
        out = torch.mm(rows, weight.T, out_dtype=torch.float32)
    elif torch.is_grad_enabled() or torch.compiler.is_compiling():
        out = F.linear(rows.float(), weight.float())
    else:
        out = widened_product(rows, weight)
    out = out.view(*x.shape[:-1], -1)
    return out if bias is None else out + bias.float()


def keep_logits_in_fp32(model):
    """Give a model that writes text, and has its weights, a head that answers in fp32."""
    head = getattr(model, "lm_head", None)
    # Other models have a head of several layers, and pick no token; a quantized one has a kernel.
    if type(head).__name__ == "Linear" and head.weight.dtype in (torch.bfloat16, torch.float16):
        model.lm_head = Head(head)
