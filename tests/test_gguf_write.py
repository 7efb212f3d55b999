"""The proof of conversion/gguf_write.py: the gguf package reads it, llama.cpp says what the model says."""

import ctypes
import functools
import math
import random
from dataclasses import asdict, replace

import pytest
import torch

from benchmarks.weights import redrawn
from benchmarks.zoo import bytes_read_per_token
from conversion.convert import convert
from conversion.match import match_tensors
from conversion.source import open_source
from conversion.tensor_table import TRANSFORMS
from models import build_model, config_from_dict, config_to_dict, create_model, load_config, load_model
from models.qwen3 import RopeScaling
from models.utils.errors import UserError
from runs_ar.generate import generate

gguf = pytest.importorskip("gguf")
from benchmarks import gguf_file  # noqa: E402 (needs the package)

SIZES = {"vocab_size": 96, "max_seq_len": 64, "d_model": 64, "num_layers": 2, "d_ff": 96}
LLAMA = {**SIZES, "num_heads": 4, "num_kv_heads": 2, "head_dim": 32, "rope_base": 500.0, "tied_head": False}
SCALING = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_seq_len": 32}
MOE = {**SIZES, "num_heads": 4, "num_kv_heads": 2, "head_dim": 32, "d_expert": 32, "num_experts": 5}
MOE |= {"num_active_experts": 2, "rope_base": 500.0}
NEOX = {**SIZES, "num_heads": 2, "rotary_dim": 8}
SMALL = {
    "llama": ("llama", LLAMA),
    "llama, biases, tied": ("llama", {**LLAMA, "head_dim": 16, "qkv_bias": True, "tied_head": True}),
    "llama, scaled rope": ("llama", {**LLAMA, "rope_scaling": SCALING}),
    "transformer_lm": ("transformer_lm", {**SIZES, "num_heads": 4, "head_dim": 32}),
    "gpt2": ("gpt2", {**SIZES, "num_heads": 4}),
    "gpt_neox": ("gpt_neox", NEOX),
    "gpt_neox, in series": ("gpt_neox", {**NEOX, "rotary_dim": 32, "parallel_residual": False}),
}
# YaRN whose line begins and ends at whole pairs, 4 and 12 of 16, where llama.cpp rounds and gpt-oss does not.
YARN = {"factor": 4.0, "original_max_seq_len": 1138, "fast_turns": 32.0, "slow_turns": 1.0}
YARN |= {"rotation_scale": 0.1 * math.log(4) + 1}
WITH_YARN = {"rope_base": 1026.0, "rope_scaling": YARN}
QWEN3 = {**SIZES, "num_heads": 4, "num_kv_heads": 2, "head_dim": 32}
GEMMA = {**QWEN3, "num_layers": 3, "window": 16, "full_every": 2, "rope_base": 500.0, "rope_factor": 4.0}
GEMMA |= {"local_rope_base": 100.0, "score_scale": 32}
OSS = {name: size for name, size in QWEN3.items() if name != "d_ff"} | {
    "window": 8,
    "d_expert": 64,
    **WITH_YARN,
}
OSS |= {"num_experts": 4, "num_active_experts": 2}
LATENT = {**SIZES, "num_layers": 3, "num_heads": 4, "d_query": 24, "d_latent": 32, "head_dim": 16}
LATENT |= {"rotary_dim": 16, "value_dim": 24, "d_expert": 32, "num_experts": 8, "num_active_experts": 3}
LATENT |= {"num_shared_experts": 2, "num_groups": 4, "num_active_groups": 2, "dense_layers": [0]}
LATENT |= {"multi_token": False, "rope_base": 100.0}
MLA_YARN = {**YARN, "rotation_scale": 1.0}
NEWER = {
    "qwen3": ("qwen3-0.6b", {**QWEN3, "rope_scaling": None}),
    "qwen3, yarn": ("qwen3-0.6b", {**QWEN3, **WITH_YARN}),
    "qwen3, yarn of another scale": (
        "qwen3-0.6b",
        {**QWEN3, **WITH_YARN, "rope_scaling": {**YARN, "rotation_scale": 1.3}},
    ),
    "qwen3_moe": ("tiny-moe-python", MOE),
    "gemma3": ("gemma-3-1b", GEMMA),
    "gpt_oss": ("gpt-oss-20b", OSS),
    "deepseek_v3": ("deepseek-v3", {**LATENT, "rope_scaling": {**MLA_YARN, "score_mscale": 1.0}}),
    "deepseek_v2": (
        "deepseek-v2-lite",
        {**LATENT, "d_query": None, "num_groups": 1, "num_active_groups": 1}
        | {"rope_scaling": {**MLA_YARN, "score_mscale": 0.707}},
    ),
    "youtu": (
        "youtu-llm-2b",
        {
            n: LATENT[n]
            for n in (*SIZES, "num_heads", "d_query", "d_latent", "head_dim", "rotary_dim", "value_dim")
        }
        | {"dense_layers": [0, 1, 2], "rope_base": 100.0},
    ),
}
CONFIGS = {"llama": "tiny-llama-python", "gpt2": "tiny-gpt2-python", "gpt_neox": "tiny-neox-python"}
CONFIGS["transformer_lm"] = "transformer-lm-15m"
PROMPT = [5, 17, 60, 2, 33, 91, 8, 41]


def newer(name):
    """(name of its file, model) of one of NEWER, every parameter redrawn."""
    config, fields = NEWER[name]
    return load_config(config)[0], redrawn(create_model(config, **fields))


@pytest.fixture(params=SMALL)
def small(request):
    """(name of its file, model), every parameter redrawn."""
    model_name, fields = SMALL[request.param]
    return model_name, redrawn(create_model(CONFIGS[model_name], **fields))


def read(path):
    """{name: tensor as numbers, in the shape that torch has}."""
    tensors = gguf.GGUFReader(path).tensors
    return {t.name: torch.tensor(gguf.quants.dequantize(t.data, t.tensor_type)) for t in tensors}


@pytest.mark.parametrize("kind, levels", [("F32", None), ("F16", None), ("Q8_0", 127), ("Q4_0", 8)])
def test_every_tensor_is_read_back(small, tmp_path, kind, levels):
    model_name, model = small
    gguf_file.write_gguf(tmp_path / "x.gguf", model_name, model, kind)
    read_back, left = read(tmp_path / "x.gguf"), dict(model.named_parameters())
    # A Llama with biases on q, k and v is a Qwen2, whose heads llama.cpp rotates as we do.
    pairs = model_name in ("llama", "transformer_lm") and not getattr(model.config, "qkv_bias", False)
    if model_name == "gpt_neox":  # of which llama.cpp wants an output matrix even if it is the embedding's
        left["lm_head.weight"] = model.lm_head.weight
    for n in range(model.config.num_layers):
        if model_name in ("llama", "transformer_lm"):
            continue
        for part in ("weight", "bias"):  # one block above the other
            blocks = [left.pop(f"layers.{n}.attn.{which}_proj.{part}") for which in "qkv"]
            left[f"layers.{n}.attn.qkv_proj.{part}"] = torch.cat(blocks)
    for name, tensor in left.items():
        theirs = read_back.pop(their_name(name))
        if pairs and ("q_proj" in name or "k_proj" in name):
            theirs = unpaired(theirs, model.config.head_dim)
        assert theirs.shape == tensor.shape, name
        if tensor.dim() == 1 or levels is None:
            assert torch.allclose(theirs, tensor, rtol=1e-3 if kind == "F16" else 0, atol=1e-7), name
        else:
            step = tensor.reshape(len(tensor), -1, 32).abs().amax(dim=-1, keepdim=True) / levels
            error = (theirs - tensor).abs().reshape(len(tensor), -1, 32)
            # The scale itself is fp16. Q4_0's levels are -8 to 7: of two weights that are as large, with
            # opposite signs, one is a step off.
            assert (error <= step * (0.57 if kind == "Q8_0" else 1.01)).all(), name
    assert set(read_back) <= {"rope_freqs.weight"}


def unpaired(rows, head_dim):
    """llama.cpp's rows of a head, 0, d/2, 1, d/2 + 1, ..., in our order, written out one by one."""
    ours = torch.empty_like(rows)
    for row in range(len(rows)):
        head, place = divmod(row, head_dim)
        ours[head * head_dim + place // 2 + (place % 2) * head_dim // 2] = rows[row]
    return ours


def their_name(name):
    for ours, theirs in {
        "token_embed": "token_embd", "pos_embed": "position_embd", "final_norm": "output_norm",
        "lm_head": "output", "layers.": "blk.", "attn.qkv_proj": "attn_qkv", "attn.q_proj": "attn_q",
        "attn.k_proj": "attn_k", "attn.v_proj": "attn_v", "attn.o_proj": "attn_output",
        "ffn.gate_proj": "ffn_gate", "ffn.up_proj": "ffn_up", "ffn.down_proj": "ffn_down",
    }.items():  # fmt: skip
        name = name.replace(ours, theirs)
    return name


@functools.cache
def silent_log():
    """Kept for ever, since llama.cpp may call it whenever it likes."""
    return pytest.importorskip("llama_cpp").llama_log_callback(lambda level, text, user_data: None)


def llama_cpp_object(path, **options):
    """llama_cpp.Llama of a file: its vocabulary, its embeddings."""
    package = pytest.importorskip("llama_cpp")
    package.llama_log_set(silent_log(), ctypes.c_void_p(0))
    return package.Llama(str(path), verbose=False, n_threads=1, **options)


def llama_cpp_says(path, num_tokens=12):
    """(logits behind the prompt, greedy tokens) of llama.cpp."""
    pytest.importorskip("llama_cpp")
    from benchmarks.llama_cpp_peer import LlamaCpp

    peer = LlamaCpp(path, threads=1, num_slots=64)
    peer.load()
    return torch.tensor(peer.logits(PROMPT)), peer.run([PROMPT], num_tokens)["tokens"][0]


def difference(logits, model):
    ours = model(torch.tensor([PROMPT]))[0, -1].detach()
    return ((logits - ours).square().mean().sqrt() / ours.std()).item()


def test_llama_cpp_says_the_same(small, tmp_path):
    model_name, model = small
    gguf_file.write_gguf(tmp_path / "F32.gguf", model_name, model, "F32")
    logits, tokens = llama_cpp_says(str(tmp_path / "F32.gguf"))
    assert difference(logits, model) < 5e-3
    assert tokens == [token for (token,) in generate(model, [PROMPT], 12)]


def picks_alike(model, tokens):
    """Whether each token that llama.cpp picked is our choice too, or one that ties with it.

    The logits of random weights lie close: of two that differ by a hundredth of their spread either may win.
    """
    logits = model(torch.tensor([PROMPT + tokens]))[0, len(PROMPT) - 1 : -1]
    picked = logits.gather(-1, torch.tensor(tokens)[:, None])[:, 0]
    return (logits.amax(dim=-1) - picked <= 0.01 * logits.std(dim=-1)).all()


@pytest.mark.parametrize("name", NEWER)
def test_llama_cpp_runs_the_newer_models(name, tmp_path):
    model_name, model = newer(name)
    gguf_file.write_gguf(tmp_path / "F32.gguf", model_name, model, "F32")
    logits, tokens = llama_cpp_says(str(tmp_path / "F32.gguf"))
    assert difference(logits, model) < 5e-3
    assert picks_alike(model, tokens)


@pytest.mark.parametrize("name", NEWER)
def test_ours_reads_back_what_was_written(name, tmp_path):
    model_name, model = newer(name)
    gguf_file.write_gguf(tmp_path / "F32.gguf", model_name, model, "F32")
    convert(tmp_path / "F32.gguf", out=tmp_path / "out")
    again = load_model(tmp_path / "out")
    assert asdict(again.config) == asdict(model.config)
    state = again.state_dict()
    for tensor_name, tensor in model.state_dict().items():
        assert torch.equal(state[tensor_name], tensor), tensor_name


def test_the_older_spelling_of_latent_attention(tmp_path):
    """Keys and values from one matrix, and the sizes of as many keys as heads: the model is the same."""
    model_name, model = newer("deepseek_v3")
    new, old, c = tmp_path / "F32.gguf", tmp_path / "old-F32.gguf", model.config
    gguf_file.write_gguf(new, model_name, model, "F32")
    sizes = {
        "head_count_kv": c.num_heads,
        "key_length": c.head_dim + c.rotary_dim,
        "value_length": c.value_dim,
    }
    tensors, writer = read(new), gguf.GGUFWriter(old, "deepseek2")
    for name, field in gguf.GGUFReader(new).fields.items():
        value = sizes.get(name.removeprefix("deepseek2.attention."), field.contents())
        if not name.startswith("GGUF.") and name != "general.architecture" and not name.endswith("_mla"):
            writer.add_key_value(name, value, *field.types)
    for n in range(c.num_layers):
        keys, values = (tensors.pop(f"blk.{n}.attn_{part}_b.weight") for part in "kv")
        heads = [torch.cat([key.T, value]) for key, value in zip(keys, values)]
        tensors[f"blk.{n}.attn_kv_b.weight"] = torch.cat(heads)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    again = load_model(convert(old, out=tmp_path / "out"))
    assert again.config == model.config
    state = again.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    logits, _ = llama_cpp_says(str(old))
    assert difference(logits, model) < 5e-3


@pytest.mark.parametrize("kind, limit", [("F16", 0.01), ("Q8_0", 0.05), ("Q4_0", 0.6)])
def test_llama_cpp_reads_the_other_kinds(small, tmp_path, kind, limit):
    model_name, model = small
    gguf_file.write_gguf(tmp_path / f"{kind}.gguf", model_name, model, kind)
    logits, _ = llama_cpp_says(str(tmp_path / f"{kind}.gguf"))
    assert 1e-5 < difference(logits, model) < limit


def test_experts_are_one_tensor(tmp_path):
    model = redrawn(create_model("tiny-moe-python", **MOE))
    gguf_file.write_gguf(tmp_path / "F32.gguf", "qwen3_moe", model, "F32")
    read_back = read(tmp_path / "F32.gguf")
    for n, layer in enumerate(model.layers):
        for part in ("gate", "up", "down"):
            stacked = torch.stack([getattr(expert, f"{part}_proj").weight for expert in layer.ffn.experts])
            assert torch.equal(read_back[f"blk.{n}.ffn_{part}_exps.weight"], stacked)
        assert torch.equal(read_back[f"blk.{n}.ffn_gate_inp.weight"], layer.ffn.router.weight)
    assert gguf_file.matrix_bytes_read(tmp_path / "F32.gguf") == bytes_read_per_token(model)
    expert = sum(parameter.numel() for parameter in model.layers[0].ffn.experts[0].parameters())
    everything = sum(parameter.numel() for parameter in model.parameters())
    assert bytes_read_per_token(model) == 4 * (everything - 2 * 3 * expert), "the head is the embedding"


def test_what_is_always_f32(tmp_path):
    """Norms, biases, and what chooses experts, is 1 of them wrong and another answers."""
    model = redrawn(create_model("gpt-oss-20b", **OSS))
    gguf_file.write_gguf(tmp_path / "Q4_0.gguf", "gpt_oss", model, "Q4_0")
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "Q4_0.gguf").tensors}
    full = {name for name, kind in kinds.items() if kind == "F32"}
    assert full == {
        name for name in kinds if "norm" in name or "bias" in name or "inp" in name or "sinks" in name
    }
    assert kinds["blk.1.ffn_up_exps.weight"] == kinds["blk.0.attn_q.weight"] == "Q4_0"


def test_a_decoder_of_components_is_the_model_that_it_spells(tmp_path):
    """Qwen3 of models/modular_decoder.py goes out as a qwen3 and comes back as models/qwen3.py."""
    model_name, config = load_config("modular-qwen3-0.6b")
    fields = config_to_dict(model_name, config) | {"vocab_size": 96, "d_model": 64, "num_layers": 2}
    fields["attention"] |= {"num_heads": 4, "num_query_groups": 2, "head_dim": 32}
    for norm in ("q_norm", "k_norm"):
        fields["attention"][norm]["in_dim"] = 32
    fields["feedforward"]["hidden_dim"] = 96
    model = redrawn(build_model(*config_from_dict(fields, "test"), device="cpu"))
    gguf_file.write_gguf(tmp_path / "x.gguf", model_name, model, "F32")
    again, tokens = load_model(convert(tmp_path / "x.gguf", out=tmp_path / "out")), torch.tensor([PROMPT])
    assert type(again).__module__ == "models.qwen3"
    assert torch.allclose(again(tokens), model(tokens), atol=1e-5)


SCALING_OF_OTHERS = RopeScaling(4.0, 1138, 16.0, 1.0, 1.14)


def test_what_llama_cpp_does_not_have():
    """One line for each, before anything is written."""
    kinds = {
        "qwen3-30b-a3b": [
            ({"dense_layers": (1,)}, "experts in every"),
            ({"normalize_weights": False}, "add up"),
        ],
        "gemma-3-1b": [({"score_scale": 100}, "score_scale is 100, where llama.cpp takes 256")],
        "gpt-oss-20b": [({"swiglu_limit": 5.0}, "swiglu_limit is 5.0, where llama.cpp has 7.0")],
        "deepseek-v3": [({"dense_layers": (0, 2)}, "the first ones in llama.cpp")],
        "bert-base-uncased": [({}, "no BERT with the head")],
        "opus-mt": [({}, "no model like transformer")],
        "qwen3-4b": [({"rope_scaling": SCALING_OF_OTHERS}, "from 16.0 to 1.0 turns here")],
        "transformer-lm-15m": [({"rope_base": None}, "no model like transformer_lm .smollm3.")],
    }
    for name, changes in kinds.items():
        model_name, config = load_config(name)
        for change, message in changes:
            with pytest.raises(UserError, match=message) as error:
                gguf_file.architecture(model_name, replace(config, **change))
            assert "\n" not in str(error.value)
    for name, arch in [
        ("qwen3-30b-a3b", "qwen3moe"),
        ("deepseek-v3", "deepseek2"),
        ("youtu-llm-2b", "deepseek2"),
    ]:
        assert gguf_file.architecture(*load_config(name)) == arch


def test_rows_in_the_wrong_order_are_noticed(tmp_path, monkeypatch):
    """What a forgotten permutation does to the logits is far beyond the limit of the tests above."""
    model = redrawn(create_model("tiny-llama-python", **LLAMA))
    monkeypatch.setitem(TRANSFORMS, "pairs_to_halves", TRANSFORMS["copy"])
    gguf_file.write_gguf(tmp_path / "F32.gguf", "llama", model, "F32")
    logits, _ = llama_cpp_says(str(tmp_path / "F32.gguf"))
    assert difference(logits, model) > 0.1


def test_bytes_that_a_token_reads(small, tmp_path):
    model_name, model = small
    gguf_file.write_gguf(tmp_path / "x.gguf", model_name, model, "F32")
    found = gguf_file.matrix_bytes_read(tmp_path / "x.gguf")
    frequencies = 64 if getattr(model.config, "rope_scaling", None) else 0
    assert found == bytes_read_per_token(model) + frequencies


@pytest.mark.parametrize(
    "config, arch", [("gpt2", "gpt2"), ("pythia-14m", "gptneox"), ("llama-3-8b", "llama")]
)
def test_what_llama_cpp_calls_a_model(config, arch):
    assert gguf_file.architecture(*load_config(config)) == arch


ODD = ["x", "", -1, 0, 1, 3, 2**31 - 1, 2.5, float("nan"), float("inf"), -1e30, True, [], [1, 2], ["x", "y"]]


def odd_files(name, path, how_many, seed=0):
    """Files in which one field is something else, of another type mostly; yields what was changed."""
    model_name, model = newer(name)
    gguf_file.write_gguf(path, model_name, model, "F32")
    reader = gguf.GGUFReader(path)
    fields = {n: (f.contents(), f.types) for n, f in reader.fields.items() if not n.startswith("GGUF.")}
    tensors = [(t.name, t.data.copy(), t.tensor_type) for t in reader.tensors]
    generator = random.Random(seed)
    for _ in range(how_many):
        changed, value = generator.choice(list(fields)), generator.choice(ODD)
        writer = gguf.GGUFWriter(path, fields["general.architecture"][0])
        for field, (old, types) in fields.items():
            if field == "general.architecture" and field != changed:
                continue
            if field != changed:
                writer.add_key_value(field, old, types[0], types[1] if len(types) > 1 else None)
            elif value != []:
                writer.add_key_value(field, value, gguf.GGUFValueType.get_type(value))
        for tensor in tensors:
            writer.add_tensor(*tensor[:2], raw_dtype=tensor[2])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        yield f"{changed} = {value!r}"


@pytest.mark.parametrize("name", ["gemma3", "gpt_oss", "deepseek_v3", "youtu"])
def test_fields_of_odd_values_are_a_line(name, tmp_path):
    """Each file opens, or is refused in one line; whether it fits a model is asked too."""
    refused = 0
    for what in odd_files(name, tmp_path / "x.gguf", 25):
        try:
            match_tensors(open_source(tmp_path / "x.gguf"))
        except UserError as error:
            refused += 1
            assert "\n" not in str(error) and str(error).isprintable(), what
    assert refused > 8


def test_llama_cpp_writes_several_texts_at_once_as_each_alone(tmp_path, monkeypatch):
    """Three texts of which two are written at a time; the longest prompt takes several calls."""
    pytest.importorskip("llama_cpp")
    from benchmarks import llama_cpp_peer

    monkeypatch.setattr(llama_cpp_peer, "CHUNK", 32)
    model = redrawn(create_model(CONFIGS["llama"], **LLAMA))
    gguf_file.write_gguf(tmp_path / "F32.gguf", "llama", model, "F32")
    peer = llama_cpp_peer.LlamaCpp(str(tmp_path / "F32.gguf"), threads=1, num_slots=64, num_texts=2)
    peer.load()
    prompts, counts = [PROMPT[:3], (PROMPT * 9)[:40], PROMPT], [12, 3, 7]
    made = peer.run(prompts, counts)
    for prompt, count, tokens in zip(prompts, counts, made["tokens"], strict=True):
        assert tokens == [token for (token,) in generate(model, [prompt], count)]
    assert len(made["times"]) < sum(counts)
