"""The proof of models/utils/kernels/widened.py: products of half-precision weights, against those in fp64."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models.utils.kernels import onednn, widened
from tests import zoo

HALF = [torch.bfloat16, torch.float16]


@pytest.fixture
def slow(monkeypatch):
    """A CPU that is slow at half precision, whatever this one is."""
    monkeypatch.setattr(onednn, "is_slow", lambda dtype, device: dtype in HALF)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("in_cache", [1, 96 * 50, 2**20])
def test_it_is_the_product_rounded_once(dtype, bias, in_cache, monkeypatch):
    monkeypatch.setattr(widened, "IN_CACHE", in_cache)
    linear = nn.Linear(96, 130, bias=bias).to(dtype)
    many = torch.randn(4, 7, 96).to(dtype)
    with torch.inference_mode():
        for x in (many, many[:, 2], many[0, 0], many.transpose(0, 1), many[:0]):
            out = widened.Linear(linear)(x)
            exact = F.linear(x.double(), linear.weight.double(), linear.bias.double() if bias else None)
            assert out.dtype == dtype and out.shape == exact.shape
            # Half of the last bit; the sum of 96 in fp32 adds a little.
            rounding = torch.finfo(dtype).eps / 2
            assert ((out.double() - exact).abs() <= 1.01 * rounding * exact.abs() + 2e-6).all()


def test_many_rows_are_multiplied_in_fp32_and_few_are_left_to_torch(monkeypatch):
    asked = []
    monkeypatch.setattr(widened.F, "linear", lambda x, *rest: asked.append(x.dtype) or torch.zeros(len(x), 8))
    linear = widened.Linear(nn.Linear(96, 8).bfloat16())
    with torch.inference_mode():
        linear(torch.zeros(widened.FEW_ROWS, 96).bfloat16())
        linear(torch.zeros(widened.FEW_ROWS + 1, 96).bfloat16())
    assert asked == [torch.bfloat16, torch.float32]


def test_gradients_and_a_compiler_see_f_linear():
    linear, x = nn.Linear(96, 130).bfloat16(), torch.randn(12, 96).bfloat16()
    other = copy.deepcopy(linear)
    widened.Linear(linear)(x).square().sum().backward()
    F.linear(x, other.weight, other.bias).square().sum().backward()
    for ours, theirs in zip(linear.parameters(), other.parameters()):
        assert torch.equal(ours.grad, theirs.grad)
    with torch.no_grad():
        graph = torch.export.export(widened.Linear(linear), (x,)).graph
    called = [str(node.target) for node in graph.nodes if node.op == "call_function"]
    assert called == ["aten.linear.default"]


@zoo.every_model
def test_every_linear_layer_of_a_slow_cpu_is_this_one_with_the_same_weights(model_name, slow):
    model = zoo.small_model(model_name).bfloat16()
    other = copy.deepcopy(model)
    onednn.choose_products(other)
    linear = [name for name, module in model.named_modules() if type(module).__name__ == "Linear"]
    assert linear and all(type(other.get_submodule(name)) is widened.Linear for name in linear)
    ours, theirs = model.state_dict(), other.state_dict()
    assert list(ours) == list(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)
    inputs = [x.bfloat16() if x.is_floating_point() else x for x in zoo.small_inputs(model)]
    with torch.inference_mode():
        assert other(*inputs).isfinite().all()


def test_a_cpu_that_has_the_instructions_keeps_torchs_product(monkeypatch):
    monkeypatch.setattr(onednn, "is_slow", lambda dtype, device: False)
    model = nn.Sequential(nn.Linear(512, 512)).bfloat16()
    onednn.choose_products(model)
    assert type(model[0]) is nn.Linear
