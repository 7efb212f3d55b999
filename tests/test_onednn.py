"""onednn.py gives what F.linear gives, and puts each matrix where it is multiplied faster."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from conversion.checkpoint import find_checkpoint
from models import load_model
from models.utils.kernels import onednn
from tests import zoo

pytestmark = pytest.mark.skipif(
    not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()),
    reason="this torch has not both libraries",
)


@pytest.fixture
def avx512(monkeypatch):
    """What this page chooses where there is AVX-512, and gives everywhere."""
    monkeypatch.setattr(onednn, "instructions", lambda: ["avx2", "avx512"])
    monkeypatch.setattr(onednn, "is_slow", lambda dtype, device: False)


def draw(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


X = draw(4, 7, 96)
INPUTS = {
    "a batch": X,
    "one token": X[:1, :1],
    "one vector": X[0, 0],
    "the first of each text": X[:, 0],
    "the last of each text": X[:, -1:],
    "every second": X[:, ::2],
    "turned": X.transpose(0, 1),
    "columns": draw(96, 5).T,
    "expanded": X[:1].expand(3, -1, -1),
    "no texts": X[:0],
    "no tokens": X[:, :0],
    "four dimensions": X.view(2, 2, 7, 96),
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("x", INPUTS.values(), ids=INPUTS)
def test_it_gives_what_f_linear_gives(x, bias):
    linear = nn.Linear(96, 130, bias=bias)
    with torch.inference_mode():
        out = onednn.Linear(linear)(x)
    exact = F.linear(x.double(), linear.weight.double(), linear.bias.double() if bias else None)
    assert out.shape == exact.shape and out.dtype == torch.float32
    assert torch.allclose(out.double(), exact, atol=2e-6)


def test_the_operator_is_called_where_nothing_is_recorded(monkeypatch):
    """Otherwise the page would change nothing, and nobody would see it."""
    monkeypatch.setattr(onednn.F, "linear", None)
    with torch.no_grad():
        onednn.Linear(nn.Linear(96, 8))(X)


def test_elsewhere_than_on_a_cpu_it_is_f_linear(monkeypatch):
    monkeypatch.setattr(onednn.F, "linear", lambda *args: "asked")
    with torch.no_grad():
        assert onednn.Linear(nn.Linear(96, 8, device="meta"))(X.to("meta")) == "asked"


def test_gradients_are_those_of_f_linear():
    linear = nn.Linear(96, 130)
    other = copy.deepcopy(linear)
    onednn.Linear(linear)(X).square().sum().backward()
    F.linear(X, other.weight, other.bias).square().sum().backward()
    for ours, theirs in zip(linear.parameters(), other.parameters()):
        assert torch.equal(ours.grad, theirs.grad)


def test_a_compiler_sees_f_linear():
    """compile.py puts other formulas in the place of F.linear, and so has to meet it."""
    with torch.no_grad():
        graph = torch.export.export(onednn.Linear(nn.Linear(96, 8)), (X,)).graph
    called = [str(node.target) for node in graph.nodes if node.op == "call_function"]
    assert called == ["aten.linear.default"]


@zoo.every_model
def test_a_model_says_what_it_said(model_name, avx512):
    model = zoo.small_model(model_name, vocab_size=4001, d_model=192, num_heads=6, d_ff=2048)
    other = copy.deepcopy(model)
    onednn.choose_products(other)
    inputs = zoo.small_inputs(model, batch_size=2, length=20)
    with torch.inference_mode():
        assert torch.allclose(other(*inputs), model(*inputs), atol=1e-4)
    ours, theirs = model.state_dict(), other.state_dict()
    assert list(ours) == list(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_large_matrices_go_to_onednn_and_small_ones_lie_in_columns(avx512):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(1024, 256)
            self.small, self.large = nn.Linear(256, 1023), nn.Linear(256, 1024)
            self.head = nn.Linear(256, 1024, bias=False)
            self.head.weight = self.embed.weight

    model = Model()
    before = dict(model.named_parameters())
    onednn.choose_products(model)
    assert dict(model.named_parameters()).keys() == before.keys()
    assert type(model.small) is nn.Linear and model.small.weight.stride() == (1, 1023)
    assert type(model.large) is type(model.head) is onednn.Linear
    assert model.large.weight is before["large.weight"] and model.large.weight.is_contiguous()
    assert model.head.weight is model.embed.weight and model.head.bias is None

    model = Model().bfloat16()
    onednn.choose_products(model)
    assert type(model.large) is nn.Linear and model.small.weight.is_contiguous()


def test_without_one_of_the_libraries_nothing_changes(monkeypatch, avx512):
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    model = nn.Sequential(nn.Linear(512, 512), nn.Linear(8, 16))
    onednn.choose_products(model)
    assert type(model[0]) is nn.Linear and model[1].weight.is_contiguous()


def test_without_avx512_nothing_changes(monkeypatch):
    monkeypatch.setattr(onednn, "instructions", lambda: ["avx2"])
    model = nn.Sequential(nn.Linear(512, 512), nn.Linear(8, 16))
    onednn.choose_products(model)
    assert type(model[0]) is nn.Linear and model[1].weight.is_contiguous()


def test_load_model_chooses(avx512):
    folder = find_checkpoint("tiny-llama-python")
    model = load_model(folder, dtype=torch.float32)
    assert type(model.lm_head) is onednn.Linear
    assert not model.layers[0].attn.q_proj.weight.is_contiguous()
    model = load_model(folder, dtype=torch.float32, arranged=False)
    assert type(model.lm_head) is nn.Linear and model.layers[0].attn.q_proj.weight.is_contiguous()


def test_a_step_reads_rows(avx512):
    model = nn.Sequential(nn.Linear(512, 512), nn.Linear(8, 16))
    onednn.choose_products(model, by_columns=False)
    assert type(model[0]) is onednn.Linear and model[1].weight.is_contiguous()
