"""Many rows times a matrix in bf16, on a CPU that cannot multiply bf16: in fp32, a part at a time.

    out = widened_product(x, weight)      F.linear in fp32, of weights in bf16 or fp16

Where a CPU lacks the instructions, torch's product of a prompt in bf16 takes four times as long as in fp32.
(In fp16 six times, and hardly any CPU has those instructions.)
A bf16 is the upper half of an fp32, so making it one costs next to nothing; but all of a matrix in fp32 would
be twice what it was, written to memory and read again. A part that fits into a cache never gets there:

    for each part of the weight's rows, 4 MB in fp32:
        widen it into a buffer, always the same
        multiply x, in fp32, by the buffer            as every product in fp32

Milliseconds for one matrix of 3072 x 768, two cores of an AMD EPYC (Zen 5) that were told to have AVX2 alone:

    rows of x               1      2      5      8     32    128    512
    F.linear in bf16      .26    .20    .47    .77   3.13  11.83  48.17
    widened               .29    .41    .54    .57   1.15   3.27  12.02
    F.linear in fp32      .57   1.17    .67    .67   1.19   3.25  11.78

A few rows stay with F.linear, whose sums are long by then. Sums are in fp32, and only the result is rounded:
it is closer to the exact one than that of a product in bf16.
Shapes: N outputs, K inputs.
Proof: tests/test_widened.py, against the product in fp64.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IN_CACHE = 2**20  # numbers of a matrix that are fp32 at a time: 4 MB
FEW_ROWS = 5  # with so many F.linear is no slower


class Linear(nn.Module):
    """In the place of torch's Linear, or of transformer_lm's own, with the parameters of that one."""

    def __init__(self, linear):
        super().__init__()
        self.weight, self.bias = linear.weight, getattr(linear, "bias", None)

    def forward(self, x: Tensor) -> Tensor:
        few = x.numel() <= FEW_ROWS * x.shape[-1]
        if few or torch.is_grad_enabled() or torch.compiler.is_compiling() or not x.is_cpu:
            return F.linear(x, self.weight, self.bias)
        out = widened_product(x, self.weight)
        return (out if self.bias is None else out.add_(self.bias)).to(x.dtype)


def widened_product(x: Tensor, weight: Tensor) -> Tensor:
    """x (..., K), weight (N, K) in half precision -> (..., N) in fp32; it has no gradient."""
    rows, parts = x.reshape(-1, x.shape[-1]).float(), weight.split(max(1, IN_CACHE // weight.shape[1]))
    memory = torch.empty(parts[0].shape, device=weight.device)
    out = torch.cat([F.linear(rows, memory[: len(part)].copy_(part)) for part in parts], dim=-1)
    return out.view(*x.shape[:-1], -1)
