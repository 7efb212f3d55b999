"""The proof of models/utils/head.py: logits in fp32 of weights in half precision."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from conversion.checkpoint import find_checkpoint
from models import create_model, load_model
from models.utils import compile as compile_page
from models.utils import head as page
from models.utils.compile import compile_decoding
from models.utils.head import Head, keep_logits_in_fp32
from models.utils.kernels import widened
from tests.compiler import needs_compiler

HALF = [torch.bfloat16, torch.float16]


def exact(x, linear):
    bias = None if linear.bias is None else linear.bias.double()
    return F.linear(x.double(), linear.weight.double(), bias)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("in_cache, built", [(1, False), (96 * 50, False), (2**20, False), (1, True)])
def test_it_is_the_product_in_fp32(dtype, bias, in_cache, built, monkeypatch):
    monkeypatch.setattr(widened, "IN_CACHE", in_cache)
    monkeypatch.setattr(page, "is_built", lambda source: built)
    linear = nn.Linear(96, 130, bias=bias).to(dtype)
    x = torch.randn(3, 2, 96).to(dtype)
    with torch.inference_mode():
        for rows in (x, x[0, 0], x[:, :1], x.transpose(0, 1)):
            out = Head(linear)(rows)
            assert out.dtype == torch.float32 and out.shape == (*rows.shape[:-1], 130)
            torch.testing.assert_close(out.double(), exact(rows, linear), rtol=1e-5, atol=1e-5)
        assert not torch.equal(Head(linear)(x), linear(x).float())


def test_nothing_is_built_for_it(monkeypatch):
    monkeypatch.setattr(page, "is_built", lambda source: False)
    monkeypatch.setattr(page, "linear_fits", lambda *args: pytest.fail("asks for a library"))
    with torch.inference_mode():
        Head(nn.Linear(96, 130).bfloat16())(torch.randn(1, 96).bfloat16())


def test_it_has_gradients():
    linear, x = nn.Linear(96, 130).bfloat16(), torch.randn(4, 96).bfloat16()
    Head(linear)(x).square().sum().backward()
    ours, linear.weight.grad = linear.weight.grad, None
    linear(x).float().square().sum().backward()
    torch.testing.assert_close(ours.float(), linear.weight.grad.float(), rtol=0.05, atol=0.2)


@pytest.mark.parametrize("dtype", HALF)
def test_which_models_get_it(dtype):
    llama = create_model("tiny-llama-python-draft").to(dtype)
    keep_logits_in_fp32(llama)
    assert type(llama.lm_head) is Head and llama.lm_head.weight is llama.token_embed.weight
    assert "lm_head.weight" in dict(llama.named_parameters(remove_duplicate=False))
    for config in ("tiny-bert-python", "tiny-vit-digits"):
        model = create_model(config).to(dtype)
        before = [type(module) for module in model.modules()]
        keep_logits_in_fp32(model)
        assert [type(module) for module in model.modules()] == before
    in_fp32 = create_model("tiny-llama-python-draft")
    keep_logits_in_fp32(in_fp32)
    assert type(in_fp32.lm_head) is nn.Linear


@pytest.mark.parametrize("name", ["tiny-llama-python-draft", "tiny-neox-python"])
def test_a_loaded_model_answers_with_the_sums_as_they_are(name):
    """Of 512 places, in many of which logits rounded to bf16 tie at the top, not one does."""
    model = load_model(find_checkpoint(name), dtype=torch.bfloat16)
    tokens = torch.randint(3, 500, (1, 512), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        out, hidden = model(tokens), model.hidden(tokens)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), exact(hidden, model.lm_head), rtol=1e-4, atol=1e-4)
    assert ties(out.bfloat16()) > 5 and ties(out) == 0


def ties(logits):
    first, second = logits.topk(2).values.unbind(-1)
    return (first == second).sum().item()


@needs_compiler
def test_a_compiled_step_answers_with_the_sums_as_they_are(tmp_path, monkeypatch):
    monkeypatch.setattr(compile_page, "CACHE_FOLDER", tmp_path)
    model = load_model(find_checkpoint("tiny-llama-python-draft"), dtype=torch.bfloat16, arranged=False)
    said = []
    with torch.inference_mode():
        step = compile_decoding(model, report=said.append)
        cache, tokens, place = step.new_cache(1, 20), torch.tensor([[5]]), torch.tensor([[0]])
        assert all(step.steps.values()), said
        logits, expected = step(tokens, place, cache), model(tokens)
    assert logits.dtype == torch.float32 and (logits != logits.bfloat16().float()).float().mean() > 0.9
    assert (logits - expected).norm() < 0.02 * expected.norm()
