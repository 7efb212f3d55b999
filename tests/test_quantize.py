"""The proof of models/utils/quantize.py: the arithmetic, torch's kernels, every model, disk and memory."""

import argparse
import gc
import json
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

import conversion.convert
import convert_hf_checkpoint
import run
from conversion import checkpoint
from conversion.convert import calibration_windows, convert, reverse
from models import MODEL_NAMES, build_model, config_from_dict, load_model
from models.transformer_lm import Linear
from models.utils import calibration, quantize
from models.utils.calibration import input_products
from models.utils.errors import UserError
from models.utils.quantize import Int4Linear, Int8Linear, Quantization, quantize_layers
from models.utils.tokenizer import load_tokenizer
from models.utils.weights import load_weights
from runs_train.evaluation import bits_per_byte, bytes_of_tokens
from runs_train.text_data import is_held_out
from tests import zoo

ROOT = Path(__file__).parent.parent
TINY = ROOT / "checkpoints"
SAMPLE = ROOT / "tests" / "data" / "held_out_python.txt"
INT8, INT4 = Quantization("int8"), Quantization("int4", 32)
# A text of the kind that the tiny models know, and none of those that they are measured on.
TEXT = Path(argparse.__file__)


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def weights(N, K, dtype=torch.float32, seed=0):
    """Rows of different sizes, with a few large weights in each, as trained models have them."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(N, K, generator=generator) * torch.rand(N, 1, generator=generator)
    return (0.1 * weight + 0.02 * torch.randn(N, K, generator=generator) ** 3).to(dtype)


def linear(N, K, dtype=torch.float32, bias=True, seed=0):
    torch.manual_seed(seed)
    layer = torch.nn.Linear(K, N, bias=bias).to(dtype)
    layer.weight.copy_(weights(N, K, dtype, seed))
    return layer


def quantized(layer, quantization):
    """The layer that takes its place in a model."""
    model = torch.nn.Sequential(layer)
    quantize_layers(model, quantization)
    quantize.prepare(model)
    return model[0]


# The arithmetic ---------------------------------------------------------------------------------------------


def plain_int8(row):
    """One row in Python's own numbers."""
    scale = max(abs(w) for w in row) / 127
    return [round(w / scale) * scale for w in row], scale


def plain_int4(group):
    """One group in Python's own numbers: 16 levels from the smallest weight to the largest."""
    low, high = min(group), max(group)
    step = (high - low) / 15
    return [low + round((w - low) / step) * step for w in group], step


def test_int8_is_the_plain_formula():
    weight = weights(7, 48)
    codes, scale = quantize.quantize_int8(weight)
    assert codes.dtype == torch.int8 and codes.abs().amax(dim=1).eq(127).all()
    again = quantize.dequantize_int8(codes, scale)
    for row, got in zip(weight.tolist(), again):
        expected, step = plain_int8(row)
        assert (got - torch.tensor(expected)).abs().max() <= 1e-5 * step
    # No weight is further away than half a step.
    assert ((again - weight).abs() <= 0.5001 * scale[:, None]).all()


@pytest.mark.parametrize("size", [32, 64, 128])
def test_int4_to_the_nearest_is_the_plain_formula(size):
    weight = weights(5, 256) + 0.03
    packed, scale_zero = quantize.quantize_int4(weight, size, quantize.rtn_int4)
    assert packed.shape == (5, 128) and packed.dtype == torch.uint8
    assert scale_zero.shape == (256 // size, 5, 2)
    again = quantize.dequantize_int4(packed, scale_zero)
    for group, got in zip(weight.view(-1, size).tolist(), again.view(-1, size)):
        expected, step = plain_int4(group)
        assert (got - torch.tensor(expected)).abs().max() <= 1e-4 * step


def test_rows_in_pieces_are_the_same_as_at_once(monkeypatch):
    whole = quantize.quantize_int4(weights(40, 64), 32)
    monkeypatch.setattr(quantize, "WEIGHTS_AT_ONCE", 64 * 7)
    assert all(torch.equal(a, b) for a, b in zip(whole, quantize.quantize_int4(weights(40, 64), 32)))


def test_two_codes_in_a_byte_come_out_again():
    codes = torch.arange(16).repeat(3, 4)
    packed = quantize.pack(codes)
    assert packed[0, :3].tolist() == [0x10, 0x32, 0x54]
    assert torch.equal(quantize.unpack(packed), codes.to(torch.uint8))


@pytest.mark.parametrize(
    "weight", [torch.zeros(16, 32), torch.full((16, 32), 0.7), torch.full((16, 32), -2.0)]
)
def test_rows_of_one_value_are_kept(weight):
    assert torch.allclose(quantize.dequantize_int8(*quantize.quantize_int8(weight)), weight, atol=1e-6)
    assert torch.allclose(quantize.dequantize_int4(*quantize.quantize_int4(weight, 32)), weight, atol=1e-6)


def test_a_scale_in_bf16_costs_no_more_than_its_range():
    """The codes are chosen for the scale as it is kept; else its rounding would shift whole rows."""
    weight = weights(64, 256, torch.bfloat16)
    codes, scale = quantize.quantize_int8(weight)
    error = (codes.float() * scale.float()[:, None] - weight.float()).abs() / scale.float()[:, None]
    assert (error[codes.abs() < 127] <= 0.5001).all()


def relative_error(again, weight):
    return ((again - weight).norm() / weight.norm()).item()


@pytest.mark.parametrize("size", [32, 64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_search_beats_rounding_to_nearest_in_every_group(size, dtype):
    groups = weights(64, 256, dtype).float().view(64, -1, size)
    nearest, searched = (
        ((codes.double() - 8) * scale.double() + zero.double() - groups).square().sum(-1)
        for codes, scale, zero in (quantize.rtn_int4(groups, dtype), quantize.search_int4(groups, dtype))
    )
    assert (searched <= nearest).all()
    assert searched.sum() <= 0.9 * nearest.sum()


# Calibration ------------------------------------------------------------------------------------------------


def moving_together(num_rows, K, seed=3):
    """Inputs of different sizes that depend on each other, as those of real layers do."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_rows, K // 4, generator=generator) @ torch.randn(K // 4, K, generator=generator)
    return (x + torch.randn(num_rows, K, generator=generator)) * torch.rand(K, generator=generator)


def products_of(linear, x):
    """X^T X in blocks, as the layer sees its inputs, in two pieces."""
    return input_products(torch.nn.Sequential(linear), ["0"], x.split(70))["0"]


def calibrated(weight, size, products):
    shares = [quantize.error_shares(product) for product in products]
    return quantize.quantize_int4(weight, size, partial(quantize.calibrated_int4, shares=shares))


def plain_calibrated(weight, x, scale, zero):
    """Column by column, all weights that are not yet rounded solved for anew: nothing of Cholesky."""
    K, weight = x.shape[1], weight.double()
    product = x.double().T @ x.double()
    product += 0.01 * product.diagonal().mean() * torch.eye(K)
    again, moved = weight.clone(), weight.clone()
    for j in range(K):
        code = ((moved[:, j] - zero) / scale + 8).round().clamp(0, 15)
        again[:, j] = (code - 8) * scale + zero
        done, left = slice(0, j + 1), slice(j + 1, K)
        error = again[:, done] - weight[:, done]
        change = torch.linalg.solve(product[left, left], product[left, done] @ error.T).T
        moved[:, left] = weight[:, left] - change
    return again


def test_calibrated_weights_are_those_of_least_squares():
    weight, x = weights(24, 32), moving_together(140, 32)
    packed, scale_zero = calibrated(weight, 32, products_of(linear(8, 32), x))
    scale, zero = scale_zero[0].double().T
    expected = plain_calibrated(weight, x, scale, zero)
    again = quantize.dequantize_int4(packed, scale_zero)
    assert (again - expected).abs().max() <= 1e-5 * scale.max()


@pytest.mark.parametrize("size", [32, 128])
def test_calibration_brings_the_outputs_closer_than_the_search(size):
    """On the inputs of the text, and on others that move together in the same way."""
    weight, x = weights(64, 256), moving_together(4000, 256)
    best = calibrated(weight, size, products_of(linear(8, 256), x[:2000]))
    searched = quantize.quantize_int4(weight, size)
    for part in x.split(2000):
        expected = F.linear(part, weight)
        errors = [
            relative_error(F.linear(part, quantize.dequantize_int4(*quantized)), expected)
            for quantized in (best, searched)
        ]
        assert errors[0] < 0.6 * errors[1]


def test_products_of_inputs_in_blocks(monkeypatch):
    monkeypatch.setattr(calibration, "BLOCK", 128)
    x = moving_together(140, 320)
    layer = linear(8, 320)
    products = products_of(layer, x)
    assert [tuple(product.shape) for product in products] == [(128, 128), (128, 128), (64, 64)]
    for n, product in enumerate(products):
        block = x[:, 128 * n : 128 * (n + 1)]
        assert relative_error(product, block.T @ block) < 1e-5
    assert not layer._forward_pre_hooks
    packed, scale_zero = calibrated(layer.weight, 64, products)
    assert packed.shape == (8, 160) and scale_zero.shape == (5, 8, 2)
    # No block changes what another becomes.
    shares = [quantize.error_shares(products[1])]
    second = quantize.quantize_int4(
        layer.weight[:, 128:256], 64, partial(quantize.calibrated_int4, shares=shares)
    )
    assert torch.equal(second[0], packed[:, 64:128])


@pytest.mark.parametrize("scale", [0.0, 1e-20])
def test_inputs_that_never_move_leave_the_search(scale):
    weight = weights(16, 64)
    packed, scale_zero = calibrated(weight, 32, products_of(linear(8, 64), torch.full((9, 64), scale)))
    expected = quantize.quantize_int4(weight, 32)
    assert torch.equal(packed, expected[0]) and torch.equal(scale_zero, expected[1])


def test_inputs_that_overflow_are_an_error():
    with pytest.raises(UserError, match="inputs of 0 overflow"):
        products_of(linear(8, 64), torch.full((9, 64), torch.inf))


# torch's kernels --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("N, K", [(64, 96), (63, 160), (10, 32), (2, 128)])
@pytest.mark.parametrize("num_rows", [1, 3, 40])
@pytest.mark.parametrize("quantization", [INT8, INT4], ids=["int8", "int4"])
def test_kernels_multiply_by_the_dequantized_weights(N, K, num_rows, quantization):
    layer = linear(N, K, torch.bfloat16)
    x = torch.randn(num_rows, 1, K, generator=torch.Generator().manual_seed(1)).bfloat16()
    if quantization is INT8:
        again = quantize.dequantize_int8(*(t.cpu() for t in quantize.quantize_int8(layer.weight)))
    else:
        packed, scale_zero = quantize.quantize_int4(layer.weight, 32)
        again = quantize.dequantize_int4(packed, scale_zero.float())
    expected = F.linear(x.float(), again.float(), layer.bias.float())
    out = quantized(layer, quantization)(x)
    assert out.dtype == torch.bfloat16 and out.shape == (num_rows, 1, N)
    # bf16 keeps 8 bits: of the result, and of what is summed.
    assert ((out - expected).abs() <= 2**-7 * expected.abs() + 0.01 * expected.std()).all()


@pytest.mark.parametrize("quantization", [INT8, INT4])
def test_rows_that_lie_apart(quantization):
    """As the first tokens of several texts do, which a pooler or a classifier reads."""
    layer = quantized(linear(32, 64, torch.bfloat16), quantization)
    x = torch.randn(4, 7, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    assert torch.equal(layer(x[:, 0]), layer(x[:, 0].contiguous()))


@pytest.mark.parametrize("offset", [1, 8, 15])
def test_codes_that_begin_anywhere_in_a_file(offset):
    layer = quantized(linear(32, 64, torch.bfloat16), INT8)
    x = torch.randn(2, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    expected, codes = layer(x), layer.weight
    memory = torch.empty(codes.numel() + 32, dtype=torch.int8)
    start = -memory.data_ptr() % 16 + offset
    layer.weight = quantize.fixed(memory[start : start + codes.numel()].view(codes.shape).copy_(codes))
    layer.prepare()
    assert layer.weight.data_ptr() % 16 == 0, "torch's kernel would crash"
    assert torch.equal(layer(x), expected)


def test_bf16_uses_the_kernels_and_fp32_does_not(monkeypatch):
    int4, int8 = quantized(linear(32, 64, torch.bfloat16), INT4), quantized(linear(32, 64), INT8)
    assert int4.tiled and not quantized(linear(32, 64), INT4).tiled
    calls = []
    monkeypatch.setattr(torch, "_weight_int8pack_mm", lambda *args: calls.append(args))
    int8(torch.randn(2, 64))
    assert not calls
    with pytest.raises(AttributeError):
        quantized(linear(32, 64, torch.bfloat16), INT8)(torch.randn(2, 64).bfloat16())
    assert len(calls) == 1


# Which layers -----------------------------------------------------------------------------------------------


def test_a_group_that_does_not_divide_falls_back_and_says_so():
    layers = {"a": linear(16, 256), "b": linear(16, 192), "c": linear(16, 48), "d": linear(16, 40)}
    model = torch.nn.ModuleDict(layers)
    before = {name: layer.weight.clone() for name, layer in layers.items()}
    notes = quantize_layers(model, Quantization("int4", 128))
    assert [type(model[n]).__name__ for n in "abcd"] == ["Int4Linear", "Int4Linear", "Int8Linear", "Linear"]
    assert (model["a"].group_size, model["b"].group_size) == (128, 64)
    assert notes == [
        "b has groups of 64 (its width is 192)",
        "c is int8 (no group divides its width 48)",
        "d keeps its precision (its width 40 is no multiple of 16)",
    ]
    assert torch.equal(model["d"].weight, before["d"])


def test_what_is_no_matrix_of_a_linear_layer_is_named():
    """As the weights of many experts in one tensor."""
    model = torch.nn.Sequential(linear(16, 64))
    model.register_parameter("experts", torch.nn.Parameter(torch.zeros(4, 32, 64)))
    notes = quantize_layers(model, INT8)
    assert notes == ["experts keeps its precision (its 32.8 kB are no matrix of a linear layer)"]
    assert isinstance(model[0], Int8Linear) and model.experts.dtype == torch.float32


def test_whoever_waits_is_told_for_how_long(monkeypatch, capsys):
    seconds = iter(range(0, 100, 2))
    monkeypatch.setattr(quantize.time, "monotonic", lambda: next(seconds))
    quantize_layers(torch.nn.Sequential(*(linear(16, 64) for _ in range(5))), INT8)
    said = [line for line in capsys.readouterr().err.splitlines() if "takes about" in line]
    assert said == ["quantizing 5 layers, which takes about 10 s"]


@pytest.mark.parametrize("quantization", [INT8, INT4])
def test_many_rows_are_multiplied_in_what_the_cpu_is_fast_at(quantization, monkeypatch):
    layer = linear(32, 64, torch.bfloat16)
    model = torch.nn.Sequential(layer)
    quantize_layers(model, quantization)
    x = torch.randn(40, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    again, asked = model[0].dequantized(), []
    product = F.linear
    monkeypatch.setattr(quantize.F, "linear", lambda *args: asked.append(args[1].dtype) or product(*args))
    for slow, dtype in ((False, torch.bfloat16), (True, torch.float32)):
        monkeypatch.setattr(quantize, "is_slow", lambda *_, slow=slow: slow)
        out = model(x)
        assert out.dtype == torch.bfloat16 and asked.pop() == dtype
        assert relative_error(out.float(), product(x.float(), again.float(), layer.bias.float())) < 4e-3


def test_own_linear_of_transformer_lm_is_swapped():
    layer = Linear(64, 32)
    x = torch.randn(3, 64)
    out = quantized(layer, INT8)(x)
    assert relative_error(out, layer(x)) < 0.02


def logits_of(model):
    out = model(*zoo.small_inputs(model, length=24, seed=2))
    return out if isinstance(out, torch.Tensor) else out[0]


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    """Folders of all kinds of model: the tiny trained ones, and what has none, with fresh weights."""
    root = tmp_path_factory.mktemp("fresh")
    for kind in MODEL_NAMES:
        trained = ["tiny-llama-python-draft"] if kind == "llama" else zoo.checkpoints_of(kind)
        if trained:
            convert(TINY / trained[0], out=root / kind, progress=False)
            continue
        model = build_model(
            kind,
            zoo.small_config(kind, d_model=64, d_ff=96, d_expert=32, d_query=32, head_dim=16),
            device="cpu",
        )
        torch.manual_seed(0)
        model.init_weights()
        (root / kind).mkdir()
        (root / kind / "config.json").write_text(json.dumps(zoo.fields_of(kind, model.config)))
        save_file(dict(model.named_parameters()), root / kind / "model.safetensors")
    return root


@pytest.mark.parametrize("kind", MODEL_NAMES)
def test_every_kind_of_model_stays_close_to_full_precision(kind, fresh):
    # The tokens are random, which no model has learned, so errors are larger than on text; two layers mixed
    # up would make them larger than 1.
    full = logits_of(load_model(fresh / kind, dtype=torch.float32))
    for quantization, limit in (INT8, 0.06), (INT4, 0.45):
        model = load_model(fresh / kind, dtype=torch.float32, quantization=quantization)
        left = [n for n, m in model.named_modules() if type(m).__name__ == "Linear"]
        left = {name for name in left if not name.endswith(".router")}
        assert left <= {"lm_head", "lm_head.vocab_proj", "patch_embed"}
        error = ((logits_of(model) - full).square().mean().sqrt() / full.std()).item()
        assert 0 < error <= limit, f"{quantization}: {error:.3f}"
    assert any(isinstance(m, Int4Linear) for m in model.modules())


def test_a_router_keeps_its_precision():
    model = build_model("qwen3_moe", zoo.small_config("qwen3_moe", d_model=32, d_expert=32), device="cpu")
    notes = quantize_layers(model, INT4)
    assert type(model.layers[0].ffn.router) is torch.nn.Linear
    assert isinstance(model.layers[0].ffn.experts[4].down_proj, Int4Linear)
    assert "layers.1.ffn.router keeps its precision (it chooses experts)" in notes


def test_experts_that_the_text_never_chose_are_quantized_without_it(capsys):
    """One expert alone is chosen: it is calibrated, the others are as the search makes them."""
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_expert": 32, "num_active_experts": 1}
    config = zoo.small_config("qwen3_moe", **sizes)
    model = build_model("qwen3_moe", config, device="cpu")
    model.init_weights()
    for layer in model.layers:
        layer.ffn.router.weight.zero_()
    tokens = torch.randint(config.vocab_size, (1, 60))
    plan, _ = quantize.plan_layers(model, INT4)
    products = quantize.calibrate(model, plan, [tokens])
    reached = {name.split(".")[4] for name in products if ".experts." in name}
    assert len(reached) == 1, "of equal logits topk takes the same expert for each"
    said = capsys.readouterr().err
    assert "the text has nothing for 24 of 36 layers" in said and "quantized without it" in said
    unread = f"layers.0.ffn.experts.{next(n for n in range(5) if str(n) not in reached)}.up_proj"
    expected = quantize.quantize_int4(model.get_submodule(unread).weight, 32)
    quantize_layers(model, INT4, windows=[tokens])
    assert torch.equal(model.get_submodule(unread).weight, expected[0])


def test_a_tied_head_stays_the_embedding(fresh):
    model = load_model(fresh / "llama", quantization=INT4)
    assert model.lm_head.weight is model.token_embed.weight
    assert model.lm_head.weight.dtype == torch.bfloat16


# Bits per byte ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sample(fresh):
    """(token ids, bytes of each token) of the held-out text; all tiny language models have this tokenizer."""
    tokenizer = load_tokenizer(fresh / "llama")
    tokens = torch.tensor(tokenizer.encode(SAMPLE.read_bytes().decode(), bos=True)).numpy()
    return tokens, bytes_of_tokens(tokenizer)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_bits_per_byte(kind, fresh, sample):
    """On a few windows what README's table says on the whole sample: int8 is free, int4 costs a little."""

    def measured(**options):
        model = load_model(fresh / kind, dtype=torch.float32, **options)
        return bits_per_byte(model, *sample, context=512, stride=512, max_windows=5)

    full, int8, int4 = measured(), measured(quantization=INT8), measured(quantization=INT4)
    assert abs(int8 - full) < 0.001
    assert 0.0002 < int4 - full < 0.007


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_search_beats_rounding_to_nearest_in_the_logits(kind, fresh, sample, monkeypatch):
    tokens = torch.tensor(sample[0][:1536]).long().view(3, 512)
    full = load_model(fresh / kind, dtype=torch.float32)(tokens)

    def error():
        model = load_model(fresh / kind, dtype=torch.float32, quantization=INT4)
        return (model(tokens) - full).square().mean().sqrt() / full.std()

    searched = error()
    monkeypatch.setattr(quantize.quantize_int4, "__defaults__", (quantize.rtn_int4,))
    assert searched < 0.96 * error() < 0.1


def windows_of(kind, folder, path=TEXT):
    _, config = config_from_dict(json.loads((folder / kind / "config.json").read_text()), kind)
    return calibration_windows(path, folder / kind, kind, config)


@pytest.mark.parametrize("kind, num_windows", [("llama", None), ("gpt2", 20)])
def test_calibration_beats_the_search_and_rounding_to_nearest(kind, num_windows, fresh, sample, monkeypatch):
    assert not is_held_out(TEXT.name)
    tokens = torch.tensor(sample[0][:1536]).long().view(3, 512)
    full = load_model(fresh / kind, dtype=torch.float32)(tokens)

    def measured(**options):
        model = load_model(fresh / kind, dtype=torch.float32, quantization=INT4, **options)
        error = (model(tokens) - full).square().mean().sqrt() / full.std()
        return error, bits_per_byte(model, *sample, context=512, stride=512, max_windows=num_windows)

    error, bits = measured(windows=windows_of(kind, fresh))
    error_of_search, _ = measured()
    monkeypatch.setattr(quantize.quantize_int4, "__defaults__", (quantize.rtn_int4,))
    _, bits_of_rtn = measured()
    assert error < 0.85 * error_of_search
    assert bits < bits_of_rtn - 0.0005


def test_a_bert_is_calibrated_by_the_text_that_it_reads(fresh):
    # A window of the text itself: that all layers improve shows there as well as elsewhere.
    tokens = windows_of("bert", fresh)[-2]
    full = load_model(fresh / "bert", dtype=torch.float32)(tokens)

    def error(**options):
        model = load_model(fresh / "bert", dtype=torch.float32, quantization=INT4, **options)
        return (model(tokens) - full).square().mean()

    assert error(windows=windows_of("bert", fresh)) < 0.85 * error()


# Disk -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantization", [INT8, Quantization("int4", 64)], ids=["int8", "int4"])
def test_from_disk_it_is_what_quantizing_on_loading_makes(quantization, tmp_path):
    source = TINY / "tiny-llama-python-draft"
    convert(source, out=tmp_path / "full", progress=False)
    convert(source, out=tmp_path / "small", progress=False, quantization=quantization)
    stored = json.loads((tmp_path / "small" / "config.json").read_text())["quantization"]
    assert stored == {"kind": quantization.kind, "group_size": quantization.group_size}
    from_disk = load_model(tmp_path / "small").state_dict()
    on_loading = load_model(tmp_path / "full", quantization=quantization).state_dict()
    assert from_disk.keys() == on_loading.keys()
    for name, tensor in from_disk.items():
        assert tensor.dtype == on_loading[name].dtype and torch.equal(tensor, on_loading[name]), name
    file = load_file(tmp_path / "small" / "model.safetensors")
    layer = "layers.0.attn.q_proj"
    expected = (Int8Linear if quantization is INT8 else Int4Linear).quantized(
        load_file(tmp_path / "full" / "model.safetensors")[f"{layer}.weight"], quantization.group_size
    )
    assert all(torch.equal(file[f"{layer}.{part}"], tensor) for part, tensor in expected.items())
    assert "lm_head.weight" not in file


@pytest.mark.parametrize("name", ["tiny-gpt2-python", "tiny-llama-python-draft"])
def test_calibrated_on_disk_it_is_what_calibrating_on_loading_makes(name, fresh, tmp_path, monkeypatch):
    monkeypatch.setattr(conversion.convert, "CALIBRATION_TOKENS", 2048)
    words = ["--quantize", "int4", "--calibrate", str(TEXT), "--out", str(tmp_path / "small")]
    monkeypatch.setattr("sys.argv", ["convert", str(TINY / name), *words])
    convert_hf_checkpoint.main()
    kind = "gpt2" if "gpt2" in name else "llama"
    from_disk = load_model(tmp_path / "small").state_dict()
    windows = windows_of(kind, fresh)
    on_loading = load_model(fresh / kind, quantization=INT4, windows=windows).state_dict()
    without = load_model(fresh / kind, quantization=INT4).state_dict()
    assert from_disk.keys() == on_loading.keys()
    assert all(torch.equal(tensor, on_loading[name]) for name, tensor in from_disk.items())
    changed = [name for name, tensor in from_disk.items() if not torch.equal(tensor, without[name])]
    assert len([name for name in changed if name.endswith("weight")]) == sum(
        "scale_zero" in n for n in without
    )


class LargestFloat(TorchDispatchMode):
    """The most bytes of a float tensor that torch makes while this watches; what is mapped is not made."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor) and self.is_new(tensor, args):
                self.largest = max(self.largest, tensor.nbytes * tensor.is_floating_point())
        return out

    def is_new(self, tensor, args):
        """Neither without memory nor another's memory seen in another way."""
        if tensor.device.type == "meta":
            return False
        places = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
        return tensor.untyped_storage().data_ptr() not in places


def test_loading_from_disk_never_makes_a_full_matrix(tmp_path):
    convert(TINY / "tiny-gpt2-python", out=tmp_path / "small", progress=False, quantization=INT4)
    with LargestFloat() as seen:
        model = load_model(tmp_path / "small")
    # Scales and zeros are all that is computed in floats, where the kernel wants them padded or moved.
    scales = [p.nbytes for n, p in model.named_parameters() if n.endswith("scale_zero")]
    assert scales and seen.largest <= max(scales)


def test_quantizing_on_loading_holds_one_matrix_at_a_time(fresh, monkeypatch):
    """Beyond what the file maps: some copies of one matrix, however many layers there are."""
    alive, sizes = [], []

    def watched(weight):
        sizes.append(weight.nbytes)
        tensors = [t for t in gc.get_objects() if type(t) in (torch.Tensor, torch.nn.Parameter)]
        matrices = [t for t in tensors if t.dim() == 2 and t.dtype == torch.float32 and not t.is_meta]
        alive.append(sum(t.nbytes for t in matrices))
        return original(weight)

    original = quantize.quantize_int8
    monkeypatch.setattr(quantize, "quantize_int8", watched)
    gc.collect()
    model = load_model(fresh / "gpt2", dtype=torch.float32, quantization=INT8)
    assert len(sizes) == sum(isinstance(m, Int8Linear) for m in model.modules()) == 30
    assert max(alive) - min(alive) <= 2 * max(sizes)


# run.py and bad input ---------------------------------------------------------------------------------------


def test_run_quantizes_on_loading(fresh, capsys, monkeypatch):
    loaded = []
    monkeypatch.setattr(
        checkpoint, "load_weights", lambda *args, **kw: loaded.append(load_weights(*args, **kw)) or loaded[-1]
    )
    options = ["--device", "cpu", "--prompt", "def f(", "--max-new-tokens", "5", "--temperature", "0"]
    run.main(["--checkpoint", str(fresh / "llama"), "--quantize", "int4", "--group-size", "64", *options])
    output = capsys.readouterr()
    assert output.out.startswith("def f(")
    assert "linear layers in int4 in groups of 64; layers.{n}.ffn.down_proj has groups of 32" in output.err
    assert output.err.count("down_proj") == 1 and "lm_head keeps its precision" in output.err
    (model,) = loaded
    assert model.layers[0].attn.q_proj.group_size == 64
    assert f"{sum(p.nbytes for p in model.parameters()) / 1e6:.3g} MB of weights" in output.err


def test_run_calibrates_target_and_draft_on_loading(fresh, capsys, monkeypatch):
    loaded = []
    monkeypatch.setattr(
        checkpoint, "load_weights", lambda *args, **kw: loaded.append(args) or load_weights(*args, **kw)
    )
    folder, options = str(fresh / "llama"), ["--device", "cpu", "--prompt", "def f(", "--max-new-tokens", "5"]
    words = ["--checkpoint", folder, "--draft", folder, "--quantize", "int4", "--calibrate", str(TEXT)]
    run.main([*words, *options])
    assert capsys.readouterr().out.startswith("def f(")
    expected = windows_of("llama", fresh)
    assert [window.shape for window in expected] == [(1, 512)] * 32
    for *_, quantization, windows in loaded:
        assert quantization == INT4 and all(map(torch.equal, windows, expected))
    assert len(loaded) == 2


@pytest.mark.parametrize("main", ["run", "convert"])
@pytest.mark.parametrize(
    "content, message",
    [
        (None, r"text: cannot be read \(No such file or directory\); --calibrate takes a text file"),
        (b"", "text: is empty; --calibrate takes a text file"),
        (b"a\0b", "text: is a binary file; --calibrate takes a text file"),
        (b"\xff\xfe", "text: no UTF-8 text"),
    ],
)
def test_a_calibration_text_that_is_none(content, message, main, fresh, tmp_path, monkeypatch):
    path, out = tmp_path / "text", tmp_path / "out"
    if content is not None:
        path.write_bytes(content)
    monkeypatch.setattr(
        checkpoint, "load_weights", lambda *_, **__: pytest.fail("loaded before the text was read")
    )
    words = ["--quantize", "int4", "--calibrate", str(path)]
    with pytest.raises(UserError, match=message):
        if main == "run":
            run.main(["--checkpoint", str(fresh / "llama"), *words])
        monkeypatch.setattr(
            "sys.argv", ["convert", str(TINY / "tiny-gpt2-python"), "--out", str(out), *words]
        )
        convert_hf_checkpoint.main()
    assert not out.exists()


@pytest.mark.parametrize("name", ["tiny-vit-digits", "tiny-transformer-dates"])
def test_models_that_read_no_single_text_are_not_calibrated(name, tmp_path):
    with pytest.raises(UserError, match=f"--calibrate: a text is not what .*{name} reads"):
        convert(TINY / name, out=tmp_path / "out", progress=False, quantization=INT4, calibration=TEXT)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "words, message",
    [
        (["--calibrate", "x"], "--calibrate goes with --quantize int4"),
        (["--quantize", "int8", "--calibrate", "x"], "--calibrate goes with --quantize int4"),
        (["--group-size", "32"], "--group-size goes with --quantize int4"),
        (["--quantize", "int8", "--group-size", "32"], "a group size goes with int4"),
        (["--quantize", "int4", "--group-size", "48"], "no groups of 48; give one of: 32, 64, 128"),
        (["--quantize", "int4", "--group-size", "0"], "no groups of 0; give one of"),
        (["--quantize", "int3"], "invalid choice: 'int3'"),
    ],
)
def test_options_that_make_no_sense(words, message):
    with pytest.raises(UserError, match=message):
        run.main(words)


def test_groups_of_32_where_nothing_is_said():
    assert quantize.quantization_of("int4", None) == quantize.Quantization("int4", 32)


def test_what_is_quantized_is_not_quantized_again_nor_reversed(tmp_path, monkeypatch):
    out = tmp_path / "small"
    convert(TINY / "tiny-llama-python-draft", out=out, progress=False, quantization=INT8)
    with pytest.raises(UserError, match="is int8 already; quantize the checkpoint that it was made from"):
        load_model(out, quantization=INT4)
    with pytest.raises(UserError, match="is int8 already; run it without --quantize"):
        run.main(["--checkpoint", str(out), "--quantize", "int4", "--prompt", "x"])
    with pytest.raises(UserError, match="is int8 already; convert the checkpoint that it was made from"):
        convert(out, quantization=INT8)
    with pytest.raises(UserError, match="is int8, and what rounding took is gone"):
        reverse(out)
    monkeypatch.setattr(
        "sys.argv", ["convert", str(TINY / "tiny-gpt2-python"), "--reverse", "--quantize", "int4"]
    )
    with pytest.raises(UserError, match="--quantize says nothing to --reverse, which writes .* unquantized"):
        convert_hf_checkpoint.main()


@pytest.mark.parametrize(
    "stored", [3, {"kind": "int3", "group_size": None}, {"kind": "int4", "group_size": 7}, {"kind": "int4"}]
)
def test_a_damaged_config_names_the_file(stored, tmp_path):
    convert(TINY / "tiny-llama-python-draft", out=tmp_path / "c", progress=False, quantization=INT8)
    path = tmp_path / "c" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization": stored}))
    with pytest.raises(UserError, match=r"config\.json: "):
        load_model(tmp_path / "c")


def test_codes_without_the_field_that_explains_them(tmp_path):
    convert(TINY / "tiny-llama-python-draft", out=tmp_path / "c", progress=False, quantization=INT8)
    path = tmp_path / "c" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization": None}))
    with pytest.raises(UserError, match="convert the checkpoint again"):
        load_model(tmp_path / "c")
