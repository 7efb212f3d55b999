"""DeepSeek-V3 as it is published, with weights in FP8; the oracle dequantizes itself."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import DeepseekV3Config
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, _dequantize_fp8_weight

from conversion.convert import convert, inspect, reverse
from conversion.fp8 import BlockScaled
from conversion.weight_files import open_weights
from models import load_model
from models.utils.errors import UserError
from models.utils.quantize import Quantization
from tests import test_deepseek_v3 as deepseek
from tests.decoder_proof import random_tokens
from tests.model_proof import assert_close

# The sizes reach into a second block or a third, and end in none.
PUBLISHED = {
    **deepseek.PUBLISHED,
    "hidden_size": 140,
    "intermediate_size": 300,
    "n_routed_experts": 8,
    "num_hidden_layers": 2,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
}
# What the published files hold in other dtypes.
NO_FP8 = ("embed_tokens", "norm", "lm_head", "mlp.gate.", "eh_proj", ".head.")


def blocks(shape):
    return [-(-size // 128) for size in shape]


def stored_as_published(tensors):
    """(files' tensors, the numbers that transformers makes of them)."""
    files, numbers, generator = {}, {}, torch.Generator().manual_seed(0)
    for name, tensor in tensors.items():
        if any(part in name for part in NO_FP8):
            files[name] = tensor.float() if name.endswith("bias") else tensor.bfloat16()
            numbers[name] = files[name]
            continue
        scale = (0.5 + torch.rand(blocks(tensor.shape), generator=generator)) * tensor.abs().max() / 448
        spread = torch.empty(tensor.shape)
        for i, j in torch.cartesian_prod(*map(torch.arange, scale.shape)).tolist():
            spread[128 * i : 128 * (i + 1), 128 * j : 128 * (j + 1)] = scale[i, j]
        files[name] = (tensor / spread).clamp(-448, 448).to(torch.float8_e4m3fn)
        files[f"{name}_scale_inv"] = scale
        numbers[name] = _dequantize_fp8_weight(files[name], scale, [128, 128], torch.float32).bfloat16()
    return files, numbers


@pytest.fixture(scope="module")
def published():
    """(the oracle with the numbers of the files, these files' tensors)."""
    fields = {
        name: value for name, value in PUBLISHED.items() if name not in ("auto_map", "quantization_config")
    }
    proof = deepseek.TestDeepseekV3()
    with torch.no_grad():
        oracle = proof.oracle_of(DeepseekV3Config(**fields, experts_implementation="eager"))
        tensors = dict(split_experts(oracle.state_dict()))
        ahead = deepseek.ahead_oracle(oracle)
        files, numbers = stored_as_published(tensors | deepseek.ahead_tensors(oracle, ahead))
        oracle.load_state_dict({name: together(name, numbers) for name in oracle.state_dict()})
    return oracle, files


def split_experts(state):
    """transformers' stacked experts as the tensors of files."""
    for name, tensor in state.items():
        if ".experts." not in name or "shared" in name:
            yield name, tensor
            continue
        kinds = ["gate_proj", "up_proj"] if "gate_up" in name else ["down_proj"]
        for e, expert in enumerate(tensor):
            for kind, part in zip(kinds, expert.chunk(len(kinds))):
                yield f"{name.rpartition('.')[0]}.{e}.{kind}.weight", part


def together(name, numbers):
    """And back."""
    if name in numbers:
        return numbers[name]
    begin, kinds = name.rpartition(".")[0], ["gate_proj", "up_proj"] if "gate_up" in name else ["down_proj"]
    experts = range(PUBLISHED["n_routed_experts"])
    return torch.stack(
        [torch.cat([numbers[f"{begin}.{e}.{kind}.weight"] for kind in kinds]) for e in experts]
    )


def write(folder, tensors, **fields):
    (folder / "config.json").write_text(json.dumps({**PUBLISHED, **fields}))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


def test_the_published_files(published, tmp_path):
    oracle, files = published
    assert sum(name.endswith("_scale_inv") for name in files) > 60
    convert(write(tmp_path, files), progress=False)
    converted = load_file(tmp_path / "converted" / "model.safetensors")
    exact = {name for name, tensor in converted.items() if tensor.dtype != torch.bfloat16}
    assert exact == {"layers.1.ffn.router_bias", "ahead.layer.ffn.router_bias"}
    model = load_model(tmp_path, dtype=torch.float32)
    assert model.config.multi_token
    tokens = random_tokens(model, 2, 40)
    with torch.no_grad():
        assert_close(model(tokens), oracle(tokens).logits)


@pytest.mark.parametrize("shape", [(128, 128), (1, 1), (129, 127), (200, 300), (576, 40)])
def test_every_code_in_blocks_of_all_sizes(tmp_path, shape):
    """As by the formula in fp64, and as transformers reads files, which takes whole blocks alone."""
    bytes_ = torch.arange(torch.Size(shape).numel()).view(shape) % 254
    bytes_ = (bytes_ + (bytes_ >= 127)).to(torch.uint8)  # 127 and 255 are NaN
    scale = 10 ** (6 * torch.rand(blocks(shape), generator=torch.Generator().manual_seed(1)) - 5)
    weight = bytes_.view(torch.float8_e4m3fn)
    save_file({"w": weight, "w_scale_inv": scale}, tmp_path / "model.safetensors")
    files = BlockScaled(open_weights(tmp_path), tmp_path)
    assert set(files.entries) == {"w"} and files.entries["w"].shape == shape
    product = torch.empty(shape, dtype=torch.float64)
    for i in range(shape[0]):
        for j in range(0, shape[1], 128):
            product[i, j : j + 128] = weight[i, j : j + 128].double() * scale[i // 128, j // 128].double()
    read = files.read("w")
    # fp32 in between may move what stands just between two numbers of bf16.
    assert read.dtype == torch.bfloat16 and torch.equal(read, product.float().bfloat16())
    if all(size % 128 == 0 for size in shape):
        assert torch.equal(read, Fp8Dequantize(None)._dequantize_one(weight, scale, torch.bfloat16))


def test_back_it_is_bf16(published, tmp_path):
    _, files = published
    convert(write(tmp_path, files), progress=False)
    folder = reverse(tmp_path, progress=False)
    config, again = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    assert "quantization_config" not in config and config["dtype"] == "bfloat16"
    assert not any(name.endswith("_scale_inv") for name in again)
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    assert torch.equal(again[bias], files[bias]) and again[bias].dtype == torch.float32


def test_the_bias_that_chooses_stays_in_fp32(published, tmp_path):
    """The published files hold it in fp32: in bf16 the last experts that are chosen would be others."""
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    files = {**published[1], bias: 7 + 0.01 * torch.rand(8)}
    convert(write(tmp_path, files), progress=False)
    for dtype in (None, torch.bfloat16, torch.float16):
        model = load_model(tmp_path, dtype=dtype)
        experts = model.layers[1].ffn
        assert torch.equal(experts.router_bias, files[bias])
        assert experts.router.weight.dtype == (dtype or torch.bfloat16)
        assert model(torch.arange(5)[None]).isfinite().all()


def test_it_can_be_quantized_on_the_way(published, tmp_path, capsys):
    convert(write(tmp_path, published[1]), progress=False, quantization=Quantization("int8"))
    with torch.no_grad():
        ours, exact = (
            load_model(tmp_path)(torch.arange(20)[None]),
            published[0](torch.arange(20)[None]).logits,
        )
    assert (ours.float() - exact).norm() < 0.1 * exact.norm()


def test_inspect_shows_what_it_becomes(published, tmp_path, capsys):
    inspect(write(tmp_path, published[1]))
    shown = capsys.readouterr().out
    assert "_scale_inv" not in shown and re.search(r"q_a_proj.weight +\(28, 140\) bfloat16", shown)


NAME = "model.layers.1.self_attn.o_proj.weight"  # (140, 48)


@pytest.mark.parametrize(
    "change, fields, message",
    [
        ({f"{NAME}_scale_inv": None}, {}, r"o_proj.weight_scale_inv \(2, 1\) is missing"),
        ({NAME: None}, {}, "o_proj.weight_scale_inv has no matrix in FP8"),
        ({NAME: torch.zeros(140, 48)}, {}, "o_proj.weight_scale_inv has no matrix in FP8"),
        (
            {f"{NAME}_scale_inv": torch.ones(1, 1)},
            {},
            r"scale_inv has shape \(1, 1\), where .*o_proj.weight \(140, 48\) asks for \(2, 1\)",
        ),
        ({f"{NAME}_scale_inv": torch.ones(2)}, {}, r"has shape \(2,\), where .* asks for \(2, 1\)"),
        ({f"{NAME}_scale_inv": torch.ones(2, 1).half()}, {}, "stored as torch.float16, where float32"),
        ({f"{NAME}_scale_inv": torch.tensor([[1.0], [float("nan")]])}, {}, "o_proj.weight: 576 of its 6720"),
        ({NAME: torch.full((140, 48), 127).byte().view(torch.float8_e4m3fn)}, {}, "6720 of its 6720 .* NaN"),
        (
            {"model.norm.weight": torch.ones(140).to(torch.float8_e4m3fn)},
            {},
            r"norm.weight \(140,\) is FP8 and no matrix",
        ),
        ({}, {"quantization_config": {**PUBLISHED["quantization_config"], "fmt": "e5m2"}}, "is another than"),
        ({}, {"quantization_config": "fp8"}, "quantization_config is another than"),
    ],
)
def test_what_does_not_fit_is_said_in_a_line(published, tmp_path, change, fields, message):
    files = {name: tensor for name, tensor in {**published[1], **change}.items() if tensor is not None}
    with pytest.raises(UserError, match=message) as error:
        convert(write(tmp_path, files, **fields), progress=False)
    assert "\n" not in str(error.value) and len(error.value.lines) == 1
    assert not (tmp_path / "converted").exists()


def test_fp8_that_the_config_does_not_speak_of(published, tmp_path):
    with pytest.raises(UserError, match="problems") as error:
        convert(write(tmp_path, published[1], quantization_config=None), progress=False)
    assert re.search("is stored as F8_E4M3, which is not supported", "\n".join(error.value.lines))
