"""What show_structure.py says a model costs, against what it costs: counted, stored, kept."""

from functools import cache

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from models import build_model, config_from_dict, config_to_dict, load_config
from models.utils.machine import spoken_bytes
from models.utils.quantize import Int4Linear, Int8Linear, Quantization, quantize_layers
from structure.capture.capture import capture
from structure.facts import DTYPES, add, describe, evaluate, product_of, scaled, terms_of, totals, walk
from structure.table import flops as spoken_flops
from structure.table import plain, rows_of, table
from tests import zoo

# Widths of which int4 makes groups, and layers enough for one that stands there twice.
WIDTHS = {"d_model": 64, "head_dim": 16, "d_ff": 96, "d_expert": 32, "d_latent": 32, "value_dim": 16}
SUBJECTS = zoo.affordable_subjects(**WIDTHS, num_layers=4, max_seq_len=128) | {
    "llama": ("tiny-llama-python", {"num_kv_heads": 2, "tied_head": False, "qkv_bias": True}),
    "gpt2": ("tiny-gpt2-python", {}),
    "gemma3": ("tiny-gemma-python", {"window": 24}),  # whose ring of 30 slots is shorter than S below
    "gpt_neox": ("tiny-neox-python", {}),
    "transformer_lm": ("transformer-lm-15m", {"num_layers": 2, "vocab_size": 512}),
    "bert": ("tiny-bert-python", {"head": "pretraining", "pooler": True}),
    "vision_transformer": ("tiny-vit-digits", {}),
    "transformer": ("tiny-transformer-dates", {}),
    "transformer-short-memory": ("tiny-transformer-dates", {"cross_downsample": 3}),
}
B, T, S, N = 2, 5, 97, 12
QUANTIZED = {"int8": Quantization("int8"), "int4": Quantization("int4", 32)}
every = pytest.mark.parametrize("name", SUBJECTS)


def subject(name):
    config, changes = SUBJECTS[name]
    return config_from_dict({**config_to_dict(*load_config(config)), **changes}, name)


@cache
def captured(name):
    box = capture(*subject(name))
    return box, describe(name, *subject(name), box)


@cache
def real(name):
    return build_model(*subject(name), device="cpu").eval()


# FLOPs ------------------------------------------------------------------------------------------------------


def counted(call):
    """FLOPs by torch's own counter, with attention as the matrix products that it stands for."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        call()
    return counter.get_total_flops()


def ids(*shape):
    return torch.ones(shape, dtype=torch.long)


@every
def test_flops_of_a_call(name):
    """As many as torch counts: a prompt into a cache, a whole pass, a picture."""
    model, flops = real(name), captured(name)[1]["facts"]["model"]["flops"]
    positions = torch.arange(T).expand(B, T)
    if hasattr(model, "encode"):

        def call():
            model.decode(ids(B, T), positions, model.new_cache(model.encode(ids(B, N)), S))
    elif hasattr(model, "new_cache"):

        def call():
            model(ids(B, T), positions, model.new_cache(B, S))
    elif name == "vision_transformer":

        def call():
            model(torch.zeros(B, 1, 8, 8))
    else:

        def call():
            model(ids(B, T))

    assert evaluate(flops, B=B, T=T, S=S, N=N) == counted(call)


@pytest.mark.parametrize("name", [name for name in SUBJECTS if hasattr(real(name), "new_cache")])
def test_flops_of_a_decoded_token(name):
    model, decode = real(name), captured(name)[1]["facts"]["model"]["decode"]
    position = torch.full((B, 1), S - 1)
    if hasattr(model, "encode"):
        cache = model.new_cache(model.encode(ids(B, N)), S)
        flops = counted(lambda: model.decode(ids(B, 1), position, cache))
    else:
        cache = model.new_cache(B, S)
        with torch.no_grad():  # a ring wants the tokens before
            model(ids(B, S - 1), torch.arange(S - 1).expand(B, S - 1), cache)
        flops = counted(lambda: model(ids(B, 1), position, cache))
    assert evaluate(decode, B=B, T=1, S=S, N=N) == flops


def test_attention_by_hand():
    """Each of H heads multiplies T queries with S keys of d, and as many probabilities with values."""
    box = next(box for box, _ in walk(captured("llama")[0]) if box.label == "attention")
    assert evaluate(box.flops, B=B, T=T, S=S) == 2 * (2 * B * 8 * T * S * 32)


@every
def test_boxes_add_up(name):
    """What the whole model takes is the sum of the closed boxes, each as often as it stands there."""
    root, info = captured(name)
    for fact in ("flops", "decode", "cache", "activation"):
        parts = [scaled(info["facts"][box.id][fact], n) for box, n in walk(root) if not box.children]
        summed = {letters: pytest.approx(number) for number, letters in add(parts)}
        assert summed == {letters: number for number, letters in info["facts"]["model"][fact]}
    for dtype in DTYPES:
        parts = [info["facts"][box.id]["bytes"][dtype] * n for box, n in walk(root) if not box.children]
        assert sum(parts) == info["facts"]["model"]["bytes"][dtype]


# Bytes ------------------------------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("dtype", DTYPES)
def test_bytes_are_what_the_parameters_take(name, dtype):
    """Of a real model with real weights, quantized where the dtype says so."""
    model = build_model(*subject(name), device="cpu")
    model.init_weights()
    model.to(torch.float32 if dtype == "fp32" else torch.bfloat16)
    if dtype in QUANTIZED:
        quantize_layers(model, QUANTIZED[dtype])
        assert any(isinstance(module, (Int8Linear, Int4Linear)) for module in model.modules())
    padding = sum(padding_of(module) for module in model.modules())
    taken = sum(parameter.nbytes for parameter in model.parameters()) - padding
    assert captured(name)[1]["facts"]["model"]["bytes"][dtype] == taken


def padding_of(module):
    """Bytes of rows that int4's kernel adds in memory, see Int4Linear.prepare; no file has them."""
    if not isinstance(module, Int4Linear):
        return 0
    rows = len(module.scale_zero[0])
    return (rows - module.num_outputs) * (module.weight.nbytes + module.scale_zero.nbytes) // rows


@pytest.mark.parametrize("name", [name for name in SUBJECTS if hasattr(real(name), "new_cache")])
def test_the_cache_takes_what_new_cache_makes(name):
    model = real(name)
    if hasattr(model, "encode"):
        with torch.no_grad():
            cache = model.new_cache(model.encode(ids(B, N)), S)
        layers = [*cache.past, *cache.memory]
    else:
        layers = model.new_cache(B, S)
    numbers = sum(tensor.numel() for layer in layers for tensor in layer if tensor.is_floating_point())
    assert evaluate(captured(name)[1]["facts"]["model"]["cache"], B=B, S=S, N=N) == numbers


# Totals -----------------------------------------------------------------------------------------------------


def test_totals_of_llama_3_8b_by_hand():
    """Parameters as published, the cache's 2 x 32 layers x 8 heads x 128, and the bound that they give."""
    model_name, config = load_config("llama-3-8b")
    box = capture(model_name, config)
    info = describe("llama-3-8b", model_name, config, box)
    found = totals(info, "bf16", batch=1, prompt=1, cached=1000, bandwidth=100)
    assert box.parameters == 8_030_261_248
    assert found["weights"] == 2 * 8_030_261_248
    assert found["cache_per_token"] == 2 * 2 * 32 * 8 * 128
    assert found["cache"] == 1000 * found["cache_per_token"]
    # A token reads all but the table of tokens, of which it takes one row.
    read = 2 * (8_030_261_248 - 128_256 * 4096) + found["cache"]
    assert found["tokens_per_second"] == pytest.approx(100e9 / read)
    assert found["fits"] == {8: False, 16: False, 24: True, 80: True}
    # Two FLOPs for each weight of a matrix, and the attention.
    matrices = 8_030_261_248 - 128_256 * 4096 - 65 * 4096
    assert found["step_flops"] == 2 * matrices + 4 * 32 * 4096 * 1000


def test_totals_of_a_batch_in_int8_by_hand():
    """Three rows, of whose cache it depends what the model fits into; the cache stays in bf16."""
    model_name, config = load_config("llama-3-8b")
    info = describe("llama-3-8b", model_name, config, capture(model_name, config))
    found = totals(info, "int8", batch=3, prompt=700, cached=40_000, bandwidth=936)
    # A byte for each weight of a matrix and a scale in bf16 for each of its rows; the rest in bf16.
    D, f, V, kv, layers = 4096, 14_336, 128_256, 1024, 32
    rows = layers * (D + kv + kv + D + f + f + D) + V
    matrices = layers * (D * (D + kv + kv + D) + 3 * D * f) + V * D
    others = V * D + (2 * layers + 1) * D
    assert found["weights"] == matrices + 2 * rows + 2 * others
    per_token = 2 * 2 * layers * kv  # keys and values, two bytes each
    assert found["cache_per_token"] == per_token
    assert found["cache"] == 3 * 40_000 * per_token
    read = matrices + 2 * rows + 2 * (2 * layers + 1) * D + found["cache"]
    assert found["tokens_per_second"] == pytest.approx(3 * 936e9 / read)
    assert found["prefill_flops"] == 3 * (700 * 2 * matrices + 4 * layers * D * 700 * 700)
    assert found["step_flops"] == 3 * (2 * matrices + 4 * layers * D * 40_000)
    assert found["prefill_intensity"] == pytest.approx(found["prefill_flops"] / found["weights"])
    assert found["step_intensity"] == pytest.approx(found["step_flops"] / read)
    # 8.6 GB of weights and 15.7 GB of cache: alone they would fit.
    assert found["weights"] < 16e9 and found["cache"] < 16e9
    assert found["fits"] == {8: False, 16: False, 24: False, 80: True}


def test_a_tied_table_is_read_by_the_head():
    info = captured("gpt2")[1]
    positions = 512 * 192
    assert info["read"]["bf16"] == info["facts"]["model"]["bytes"]["bf16"] - 2 * positions


def test_a_source_is_read_once():
    """Of an encoder-decoder, a decoded token reads neither the encoder nor what makes the memory's keys."""
    root, info = captured("transformer")
    once = {box.id for box, _ in walk(root) if box.once and box.weights}
    assert {"encoder_layers.0.ffn.up_proj", "decoder_layers.0.cross_attn.k_proj"} <= once
    assert not {"decoder_layers.0.cross_attn.q_proj", "lm_head"} & once
    assert info["facts"]["encoder"]["decode"] == []
    once = ("encoder", "pos_embed", "cross_attn.k_proj", "cross_attn.v_proj")
    named = real("transformer").named_parameters()
    read = sum(parameter.numel() for name, parameter in named if not any(part in name for part in once))
    assert info["read"]["bf16"] == 2 * read


def test_terms():
    assert terms_of((3, "B", "S+1")) == [[3, "B*S"], [3, "B"]]
    assert product_of(("B", "T", 4096)) == [4096, "B*T"]
    assert product_of(("7*B", 3, "N/4")) == [5.25, "B*N"]
    assert add([[[1, "B"]], [[2, "B"], [5, ""]]]) == [[3, "B"], [5, ""]]
    assert evaluate([[2, "B*T"], [5, ""]], B=3, T=4) == 29


# The table --------------------------------------------------------------------------------------------------


@every
def test_the_table_says_the_facts(name):
    box, info = captured(name)
    lines = table(box, info, batch=B, length=S)
    assert max(map(len, lines)) < 160
    assert all(line == line.rstrip() for line in lines)
    repeated = [line for line in lines if " x " in line and "ayer" in line]
    assert len(repeated) == (2 if "transformer" in name and hasattr(real(name), "encode") else 1)
    assert ("of one more" in lines[0]) == hasattr(real(name), "new_cache")


@every
def test_the_tables_rows_are_those_of_the_model(name):
    """The parameters of each module, of all its layers together, counted in the real one."""
    root, info = captured(name)
    rows, counted = rows_of(root, info, S, B, step=True), set()
    boxes = [each for each, _ in walk(root) if each is root or each.weights or each.children or each.flops]
    assert [row[0].split(" x ")[0].strip() for row in rows] == [each.label for each in boxes]
    for box, row in zip(boxes, rows):
        around = [each for each, _ in walk(root) if any(inner is box for inner, _ in walk(each))]
        indent, times = len(row[0]) - len(row[0].lstrip()), row[0].partition(" x ")[2]
        active = f", {box.active} active" if box.active else ""
        assert indent == 2 * (len(around) - 1)
        assert times == (f"{box.repeat}{active}" if box.repeat > 1 else "")
        modules = [real(name).get_submodule(member) for member in box.members if not box.children]
        own = [parameter for module in modules for parameter in module.parameters()]
        new = {id(parameter): parameter.numel() for parameter in own if id(parameter) not in counted}
        counted |= set(new)
        if modules and len(own) == len({id(parameter) for parameter in own}):
            # Of experts, members are those of one layer.
            layers = info["facts"][box.id]["repeat"] // len(modules) if ".experts." in box.id else 1
            assert row[3] == (f"{layers * sum(new.values()):,}" if new else ""), box.id
        flops = evaluate(info["facts"][box.id]["flops"], B=B, T=S, S=S, N=S) * info["facts"][box.id]["repeat"]
        assert row[5] == spoken_flops(flops)


def test_the_summary_says_the_totals():
    """Each number under its dtype, and what all tokens need apart from what one more does."""
    box, info = captured("llama")
    lines = table(box, info, batch=3, length=500, bandwidth=50)
    for dtype, column in zip(DTYPES, (1, 2, 3, 4)):
        found = totals(info, dtype, batch=3, prompt=500, cached=500, source=500, bandwidth=50)

        def cell(label, column=column):
            [line] = [line for line in lines if line.startswith(label)]
            return line[-12 * (5 - column) :][:12].strip()

        assert cell("FLOPs a byte, one more token") == plain(found["step_intensity"])
        assert cell("FLOPs a byte, all tokens") == plain(found["prefill_intensity"])
        assert cell("tokens/s at 50 GB/s") == plain(found["tokens_per_second"])
        assert cell("weights") == spoken_bytes(found["weights"])
        assert cell("cache of a token") == spoken_bytes(found["cache_per_token"])
        assert cell("cache of 3 x 500") == spoken_bytes(found["cache"])
        assert cell("fits in 8 GB") == "yes"
    assert found["step_intensity"] != pytest.approx(found["prefill_intensity"], rel=0.1)
