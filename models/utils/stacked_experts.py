"""The experts of a layer in a compiled step: one product takes every row to the expert that it chose.

A page runs experts one by one, each with the tokens that chose it: a loop as long as the data say. A step is
compiled with all its shapes fixed. So there the loop is turned inside out. What an expert does is done once,
to all rows at the same time, and each of its linear layers is asked which matrix a row belongs to:

    page                              step
    for each expert that was chosen   gate = all rows, each times the gate_proj of its expert
        gate = its rows @ gate_proj   up   = all rows, each times the up_proj of its expert
        up   = its rows @ up_proj     out  = silu(gate) * up, each times the down_proj of its expert
        out  = ...

A row is a token and one of its A experts. The product reads the matrices of experts that some row chose, each
once, and no others: row_linear.cpp and tiled_linear.cpp sort the rows by expert. Without these kernels (on a
GPU, or for a width that they do not take) the compiler makes a loop that looks up its matrix row by row.

Nothing is copied. In the memory of compile.py the matrices of a layer's experts lie at equal distances from
each other, so that one tensor of three dimensions has them all:

    | gate 0 | up 0 | down 0 | gate 1 | up 1 | down 1 | ...        gate: (E, N, K), a stride of three matrices

So a step with A experts of width f takes little more than a dense one of width A f. For 8 of 64, D = 1024 and
f = 512, in int4 on two cores with AVX-512: 245 us a layer, and the dense one 212.

What is stacked: a module with a list of equal modules `experts`, and `run(tokens, chosen)` that takes tokens
(t, D) to those of numbers (t, A) and gives (t, A, D). What it does besides, routing, weights, shared experts,
stays as it is written.
Shapes: E experts, t tokens, A experts of each, r rows (t A); of a linear layer N outputs, K inputs.
Proof: tests/test_compile.py, tests/test_row_linear.py, tests/test_tiled_linear.py.
"""

import copy
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from models.utils.kernels import onednn, widened
from models.utils.kernels.row_linear import matrix_fits, row_linear
from models.utils.kernels.tiled_linear import TiledLinear
from models.utils.quantize import Int8Linear, add_bias


def stack_experts(model, report=print):
    """Let a step that is traced run all experts of a layer at once; the weights have their places by now."""
    for module in routed(model):
        try:
            module.stacked = StackedExperts(module.experts)
        except TypeError as error:
            report(f"experts as they are written: {error}")
            return
        module.run = either(module.run, module.stacked)


def routed(model):
    return [module for module in model.modules() if hasattr(module, "experts") and hasattr(module, "run")]


def either(one_by_one, at_once):
    def run(tokens, chosen):
        return at_once(tokens, chosen) if torch.compiler.is_compiling() else one_by_one(tokens, chosen)

    return run


@contextmanager
def without_single_experts(model):
    """While a step is traced: it has the stacked tensors alone, not thousands that it never reads."""
    modules = [module for module in routed(model) if hasattr(module, "stacked")]
    lists = [module.experts for module in modules]
    try:
        for module in modules:
            module.experts = nn.ModuleList()
        yield
    finally:
        for module, experts in zip(modules, lists):
            module.experts = experts


class StackedExperts(nn.Module):
    """What `run` does, by an expert whose linear layers hold the matrices of all."""

    def __init__(self, experts):
        super().__init__()
        self.expert = copy.deepcopy(experts[0])
        for name, layer in experts[0].named_modules():
            kind = KINDS.get(type(layer))
            if kind:
                self.expert.set_submodule(name, kind([expert.get_submodule(name) for expert in experts]))
        if left := [name for name, _ in self.expert.named_parameters()]:
            raise TypeError(f"they have {left[0]} besides their linear layers")

    def forward(self, tokens: Tensor, chosen: Tensor) -> Tensor:
        layers = [layer for layer in self.expert.modules() if isinstance(layer, Stacked)]
        for layer in layers:
            layer.chosen = chosen.flatten()  # (r,)
        out = self.expert(tokens)  # (r, D)
        for layer in layers:
            layer.chosen = None
        return out.view(*chosen.shape, -1)  # (t, A, D)


# Linear layers ----------------------------------------------------------------------------------------------


class Stacked(nn.Module):
    """The same linear layer of all experts; chosen (r,) says through whose each row goes.

    x has these r rows, or the t tokens that they are of.
    """

    def __init__(self, layers):
        super().__init__()
        self.chosen = None
        self.keep("weight", layers)
        self.keep("bias", layers)

    def keep(self, name, layers):
        parameters = [getattr(layer, name) for layer in layers]
        self.register_buffer(name, None if parameters[0] is None else stacked(parameters))

    def rows(self, x):
        times = len(self.chosen) // len(x)
        return x if times == 1 else x.repeat_interleave(times, dim=0)  # (r, K)

    def forward(self, x: Tensor) -> Tensor:
        return add_bias(self.multiply(x), None if self.bias is None else self.bias[self.chosen])  # (r, N)


class StackedLinear(Stacked):
    def multiply(self, x):
        x = self.rows(x)
        if matrix_fits(x, self.weight):
            return row_linear(x, self.weight, experts=self.chosen)
        products = self.weight[self.chosen].float() * x[:, None].float()  # (r, N, K)
        return products.sum(dim=-1).type_as(x)


class StackedTiles(Stacked):
    """The kernel takes each token once, with all its experts, so that it rounds it to 8 bits only once."""

    def __init__(self, layers):
        super().__init__(layers)
        self.of_one = layers[0].multiply

    def multiply(self, x):
        return self.of_one(x, self.weight, self.chosen)


class StackedInt8(Stacked):
    def __init__(self, layers):
        super().__init__(layers)
        self.keep("scale", layers)

    def multiply(self, x):
        products = self.weight[self.chosen].float() * self.rows(x)[:, None].float()  # (r, N, K)
        return (products.sum(dim=-1) * self.scale[self.chosen]).type_as(x)


KINDS = {
    nn.Linear: StackedLinear,
    onednn.Linear: StackedLinear,
    widened.Linear: StackedLinear,
    TiledLinear: StackedTiles,
    Int8Linear: StackedInt8,
}


@torch.no_grad()
def stacked(parameters):
    """(E, ...): all of these equal parameters in one tensor, which is where they are."""
    first, size = parameters[0], parameters[0].element_size()
    places = [parameter.data_ptr() for parameter in parameters]
    apart = places[-1] - places[0] if len(places) < 2 else places[1] - places[0]
    evenly = places == [places[0] + n * apart for n in range(len(places))] and apart % size == 0
    same_memory = len({parameter.untyped_storage().data_ptr() for parameter in parameters}) == 1
    if evenly and same_memory:
        strides = (apart // size, *first.stride())
        return first.data.as_strided((len(places), *first.shape), strides)
    together = torch.stack(list(parameters))
    for parameter, place in zip(parameters, together):
        parameter.data = place
    return together
