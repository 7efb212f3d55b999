"""The work of an operation in FLOPs: of a matrix product, a convolution, or attention.

A multiplication with the addition after it counts two. Everything else (norms, activations, softmax,
additions) is left out, as torch's FlopCounterMode leaves it out; it is a few hundredths of the work.
Attention counts every pair of a query and a slot, masked or not.
"""

import math


def flops_of(op):
    """The numbers whose sum an operation costs, each a product of its dimensions."""
    shapes = [argument.shape for argument in op.arguments]
    if op.target == "linear":
        return [2 * math.prod(op.shape) * shapes[1][-1]]
    if op.target in ("matmul", "bmm", "mm"):
        return [2 * math.prod(op.shape) * shapes[0][-1]]
    if op.target == "einsum":
        # One matrix product: what both have is summed over, or goes along.
        return [2 * math.prod(op.shape) * shapes[0][-1]]
    if op.target == "scaled_dot_product_attention":
        q, k, v = shapes[:3]
        pairs = math.prod(q[:-1]) * k[-2]
        return [2 * pairs * q[-1], 2 * pairs * v[-1]]
    if op.target in ("conv1d", "conv2d", "conv3d"):
        return [2 * math.prod(op.shape) * math.prod(shapes[1][1:])]
    return []
