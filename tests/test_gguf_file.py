"""The proof of benchmarks/gguf_file.py: the gguf package reads it, and llama.cpp says what the model says."""

from dataclasses import replace

import pytest
import torch

from benchmarks.weights import redrawn
from benchmarks.zoo import bytes_read_per_token
from models import create_model, load_config
from models.utils.errors import UserError
from runs_ar.generate import generate

gguf = pytest.importorskip("gguf")
from benchmarks import gguf_file  # noqa: E402 (needs the package)

SIZES = {"vocab_size": 96, "max_seq_len": 64, "d_model": 64, "num_layers": 2, "d_ff": 96}
LLAMA = {**SIZES, "num_heads": 4, "num_kv_heads": 2, "head_dim": 32, "rope_base": 500.0, "tied_head": False}
SCALING = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_seq_len": 32}
NEOX = {**SIZES, "num_heads": 2, "rotary_dim": 8}
SMALL = {
    "llama": ("llama", LLAMA),
    "llama, biases, tied": ("llama", {**LLAMA, "qkv_bias": True, "tied_head": True}),
    "llama, scaled rope": ("llama", {**LLAMA, "rope_scaling": SCALING}),
    "transformer_lm": ("transformer_lm", {**SIZES, "num_heads": 4, "head_dim": 32}),
    "gpt2": ("gpt2", {**SIZES, "num_heads": 4}),
    "gpt_neox": ("gpt_neox", NEOX),
    "gpt_neox, in series": ("gpt_neox", {**NEOX, "rotary_dim": 32, "parallel_residual": False}),
}
CONFIGS = {"llama": "tiny-llama-python", "gpt2": "tiny-gpt2-python", "gpt_neox": "tiny-neox-python"}
CONFIGS["transformer_lm"] = "transformer-lm-15m"
PROMPT = [5, 17, 60, 2, 33, 91, 8, 41]


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


@pytest.mark.parametrize("kind, limit", [("F16", 0.01), ("Q8_0", 0.05), ("Q4_0", 0.6)])
def test_llama_cpp_reads_the_other_kinds(small, tmp_path, kind, limit):
    model_name, model = small
    gguf_file.write_gguf(tmp_path / f"{kind}.gguf", model_name, model, kind)
    logits, _ = llama_cpp_says(str(tmp_path / f"{kind}.gguf"))
    assert 1e-5 < difference(logits, model) < limit


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


MOE = {**SIZES, "num_heads": 4, "num_kv_heads": 2, "head_dim": 32, "d_expert": 32, "num_experts": 5}
MOE |= {"num_active_experts": 2, "rope_base": 500.0}


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


def test_llama_cpp_runs_the_same_experts(tmp_path):
    model = redrawn(create_model("tiny-moe-python", **MOE))
    gguf_file.write_gguf(tmp_path / "F32.gguf", "qwen3_moe", model, "F32")
    logits, tokens = llama_cpp_says(str(tmp_path / "F32.gguf"))
    assert difference(logits, model) < 5e-3
    assert tokens == [token for (token,) in generate(model, [PROMPT], 12)]


def test_experts_that_llama_cpp_does_not_have():
    model_name, config = load_config("qwen3-30b-a3b")
    assert gguf_file.architecture(model_name, config) == "qwen3moe"
    for change in {"dense_layers": (1,)}, {"normalize_weights": False}:
        with pytest.raises(UserError, match="llama.cpp has experts in every layer"):
            gguf_file.architecture(model_name, replace(config, **change))


def test_rows_in_the_wrong_order_are_noticed(tmp_path, monkeypatch):
    """What a forgotten permutation does to the logits is far beyond the limit of the tests above."""
    model = redrawn(create_model("tiny-llama-python", **LLAMA))
    monkeypatch.setattr(gguf_file, "halves_to_pairs", lambda tensor, config: tensor)
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


def test_a_model_that_llama_cpp_does_not_have():
    with pytest.raises(UserError, match="no model like transformer"):
        gguf_file.architecture(*load_config("opus-mt"))
    model_name, config = load_config("transformer-lm-15m")
    assert gguf_file.architecture(model_name, config) == "llama"
    with pytest.raises(UserError, match="this one has no RoPE"):
        gguf_file.architecture(model_name, replace(config, rope_base=None))
