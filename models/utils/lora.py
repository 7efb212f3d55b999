"""LoRA: a trained matrix stays as it is, and two small ones beside it learn what is to change.

    y = x W^T  +  alpha / r  (x A^T) B^T        W (N, K) is frozen; A (r, K) and B (N, r) are trained

What fine-tuning adds to a matrix turns out to need few directions, so r of them are given room: a matrix of
4096 x 4096 has 16.8 M numbers, its A and B with r = 8 together 65,536. Only these have gradients and Adam's
two means, and only these are stored. B begins with zeros, so that the model begins as it was.

    attach(model, rank=8, alpha=16)        in the place of each linear layer, a LoraLinear around it
    merge(model)                           W + alpha / r  B A  in its place again: nothing is slower any more

Because of alpha / r, who doubles r need not look for another learning rate.
A base that was quantized (quantize.py) stays in its codes, the adapters do not: that is QLoRA. Its layers are
dequantized when they are read, one at a time, in the backward pass once more.

Papers: Hu et al. 2021 (LoRA, eq. 3), Dettmers et al. 2023 (QLoRA; adapters on all linear layers).
Shapes: N outputs and K inputs of a layer, r its rank.
Proof: tests/test_lora.py, against the formula and `peft`.
"""

from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.utils.errors import UserError
from models.utils.quantize import Int4Linear, Int8Linear, multiply


class LoraLinear(nn.Module):
    """In the place of a linear layer, quantized or not, which is its `base`."""

    def __init__(self, base, rank, alpha, dropout=0.0):
        super().__init__()
        N, K = shape_of(base)
        device = base.weight.device
        self.base, self.scale, self.dropout = base, alpha / rank, dropout
        self.A = nn.Parameter(torch.empty(rank, K, device=device))
        self.B = nn.Parameter(torch.zeros(N, rank, device=device))
        # As torch fills a Linear; the paper says "Gaussian".
        nn.init.uniform_(self.A, -(K**-0.5), K**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        low = F.linear(F.dropout(x, self.dropout, self.training), self.A)  # (..., r)
        # The factor where there are fewest numbers.
        return self.frozen(x) + F.linear(low * self.scale, self.B)

    def frozen(self, x):
        """What the base makes of x, in its dtype; gradients pass through it and change nothing there."""
        x = x.to(dtype_of(self.base))
        if is_quantized(self.base) and torch.is_grad_enabled():
            return ThroughCodes.apply(x, self.base)
        return self.base(x)

    def change(self):
        """(N, K): what the adapter adds to its base's matrix."""
        return self.scale * self.B.detach().float() @ self.A.detach().float()


class ThroughCodes(torch.autograd.Function):
    """x W^T of a quantized layer. F.linear would keep W for the backward pass, and all of them are the model
    in full; here each is made of its codes again when its turn comes.
    """

    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer = layer
        return multiply(x, layer.dequantized(), layer.bias)

    @staticmethod
    def backward(ctx, grad):
        # d(x W^T) = dx W^T, so what comes back to x is the gradient times W.
        return multiply(grad, ctx.layer.dequantized().to(grad.dtype).T, None), None


def is_quantized(layer):
    return isinstance(layer, (Int8Linear, Int4Linear))


def shape_of(layer):
    """(N, K), however the layer holds its weights."""
    if isinstance(layer, Int4Linear):
        return layer.num_outputs, len(layer.scale_zero) * layer.group_size
    return tuple(layer.weight.shape)


def dtype_of(layer):
    """In which a layer multiplies."""
    scales = {Int8Linear: "scale", Int4Linear: "scale_zero"}
    return getattr(layer, scales.get(type(layer), "weight")).dtype


# Whole models -----------------------------------------------------------------------------------------------


def linear_layers(model, names=()):
    """{name: layer} of those that may have an adapter; names: only those that are called so, "q_proj".

    Without names all of the stack, but for routers and their experts, of which a token passes few.
    """
    found = {
        name: layer
        for name, layer in model.named_modules()
        if name.startswith("layers.") and type(layer).__name__ in ("Linear", "Int8Linear", "Int4Linear")
    }
    if not names:
        return {name: layer for name, layer in found.items() if is_on_every_path(name)}
    there = sorted({name.rpartition(".")[2] for name in found})
    for name in names:
        if name not in there:
            raise UserError(f"no linear layer is called {name!r}; this model has: {', '.join(there)}")
    return {name: layer for name, layer in found.items() if name.rpartition(".")[2] in names}


def is_on_every_path(name):
    """Not a router, and not one of several that stand side by side: their number follows the layer's."""
    parts = name.split(".")
    return parts[-1] != "router" and not any(part.isdecimal() for part in parts[2:])


def attach(model, rank, alpha, dropout=0.0, names=()):
    """Put fresh adapters around the linear layers; nothing else is trained from now on. {name: LoraLinear}"""
    model.requires_grad_(False)
    for name, layer in linear_layers(model, names).items():
        model.set_submodule(name, LoraLinear(layer, rank, alpha, dropout))
    return adapters(model)


def adapters(model):
    """{name: LoraLinear} of those a model has."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}


@contextmanager
def switched_off(model):
    """The model as it is without its adapters, until the block ends."""
    scales = {layer: layer.scale for layer in adapters(model).values()}
    try:
        for layer in scales:
            layer.scale = 0.0
        yield model
    finally:
        for layer, scale in scales.items():
            layer.scale = scale


def attach_trained(model, factors):
    """Put adapters that were trained around their layers; factors: {name: (A, B, scale)}."""
    for name, (A, B, scale) in factors.items():
        layer = LoraLinear(model.get_submodule(name), rank=len(A), alpha=scale * len(A))
        layer.A.data, layer.B.data = A.clone(), B.clone()
        model.set_submodule(name, layer)


@torch.no_grad()
def merge(model):
    """Add each adapter to its base, which takes its place; where the base is quantized they stay two."""
    for name, layer in adapters(model).items():
        if not is_quantized(layer.base):
            weight = layer.base.weight
            merged = (weight.float() + layer.change().to(weight.device)).to(weight.dtype)
            layer.base.weight = nn.Parameter(merged, weight.requires_grad)
            model.set_submodule(name, layer.base)
    return model
