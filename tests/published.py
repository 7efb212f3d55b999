"""Small random checkpoints in the forms in which real ones are published, for the converter's tests."""

import functools
import json
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file

from tests.oracle import redraw

# Every size differs from every other, so that no transposition goes unnoticed.
LLAMA_SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
CONFIGS = {
    "llama": transformers.LlamaConfig(**LLAMA_SIZES),
    "llama-3": transformers.LlamaConfig(
        **LLAMA_SIZES, rope_parameters={**LLAMA3_ROPE, "rope_theta": 500000.0}, tie_word_embeddings=True
    ),
    "llama-biases": transformers.LlamaConfig(**LLAMA_SIZES, attention_bias=True, mlp_bias=True),
    "mistral": transformers.MistralConfig(**LLAMA_SIZES, sliding_window=None),
    "qwen2": transformers.Qwen2Config(**LLAMA_SIZES, tie_word_embeddings=True),
    "gemma3_text": transformers.Gemma3TextConfig(
        **{**LLAMA_SIZES, "num_key_value_heads": 4},
        query_pre_attn_scalar=7,
        sliding_window=5,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 3000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 200.0},
        },
    ),
    "gpt_neox": transformers.GPTNeoXConfig(
        vocab_size=61,
        hidden_size=24,
        num_attention_heads=3,
        num_hidden_layers=3,
        intermediate_size=40,
        max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": 1000.0, "partial_rotary_factor": 0.5},
    ),
    "gpt2": transformers.GPT2Config(
        vocab_size=61,
        n_embd=24,
        n_head=4,
        n_layer=3,
        n_inner=40,
        n_positions=64,
        bos_token_id=1,
        eos_token_id=2,
    ),
}


@functools.cache
def oracle(kind):
    """The model that all checkpoints of this kind are written from; nobody changes it."""
    return redraw(transformers.AutoModelForCausalLM.from_config(CONFIGS[kind], attn_implementation="eager"))


def state_of(kind):
    """Its parameters under the names that transformers saves, a tied head left out."""
    return {name: tensor.detach().clone() for name, tensor in oracle(kind).named_parameters()}


def config_of(kind):
    return json.loads(CONFIGS[kind].to_json_string())


def write(folder, kind, form="safetensors", state=None, config=None):
    """Write a checkpoint: its config.json and its weights in one of FORMS."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config or config_of(kind)))
    state = state or state_of(kind)
    stem, save = {
        "safetensors": ("model", save_file),
        "bin": ("pytorch_model", torch.save),
        "old": ("pytorch_model", functools.partial(torch.save, _use_new_zipfile_serialization=False)),
    }[form.split()[0]]
    suffix = ".safetensors" if stem == "model" else ".bin"
    if form.endswith("shards"):
        write_shards(folder, state, stem, suffix, save)
    else:
        save(state, folder / f"{stem}{suffix}")
    return folder


FORMS = ["safetensors", "safetensors shards", "bin", "bin shards", "old", "old shards"]


def write_shards(folder, state, stem, suffix, save, num_shards=3):
    """Shards dealt like cards, so that neighbours in the model are in different files."""
    weight_map = {}
    for i in range(num_shards):
        file = f"{stem}-{i + 1:05}-of-{num_shards:05}{suffix}"
        shard = dict(list(state.items())[i::num_shards])
        save(shard, folder / file)
        weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / f"{stem}{suffix}.index.json").write_text(json.dumps(index))


# Meta's own layout ------------------------------------------------------------------------------------------

META_PARAMS = {"dim": 24, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "norm_eps": 1e-5, "multiple_of": 8}
META_D_FF, META_VOCAB = 40, 62


def meta_state(seed=0):
    """Random weights under Meta's names, norms too."""
    generator = torch.Generator().manual_seed(seed)
    d, kv = 24, 12
    shapes = {"tok_embeddings.weight": (META_VOCAB, d), "norm.weight": (d,), "output.weight": (META_VOCAB, d)}
    for n in range(META_PARAMS["n_layers"]):
        shapes |= {
            f"layers.{n}.attention_norm.weight": (d,),
            f"layers.{n}.ffn_norm.weight": (d,),
            f"layers.{n}.attention.wq.weight": (d, d),
            f"layers.{n}.attention.wk.weight": (kv, d),
            f"layers.{n}.attention.wv.weight": (kv, d),
            f"layers.{n}.attention.wo.weight": (d, d),
            f"layers.{n}.feed_forward.w1.weight": (META_D_FF, d),
            f"layers.{n}.feed_forward.w2.weight": (d, META_D_FF),
            f"layers.{n}.feed_forward.w3.weight": (META_D_FF, d),
        }
    noise = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {name: 1 + 0.3 * x if x.dim() == 1 else 1.5 * x * x.shape[1] ** -0.5 for name, x in noise.items()}


def write_meta(folder, state=None, params=None, num_files=1, embedding_cut=0):
    """params.json and consolidated.NN.pth, each file a slice as the papers' model parallelism cuts it."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "params.json").write_text(json.dumps(params or {**META_PARAMS, "vocab_size": META_VOCAB}))
    state = state or meta_state()
    for i in range(num_files):
        slices = {
            name: tensor.chunk(num_files, meta_cut(name, embedding_cut))[i].clone()
            if tensor.dim() == 2
            else tensor
            for name, tensor in state.items()
        }
        torch.save(slices, folder / f"consolidated.{i:02}.pth")
    return folder


def meta_cut(name, embedding_cut):
    """Column parallel: wq, wk, wv, w1, w3, output; row parallel: wo, w2; the embedding changed its way."""
    if "tok_embeddings" in name:
        return embedding_cut
    return 1 if "wo." in name or "w2." in name else 0


def meta_logits(state, params, tokens, rope_base=10000.0):
    """What Meta's code computes, with RoPE as complex numbers whose parts are neighbouring features.

    Su et al. 2021, eq. 13: feature pairs (2i, 2i + 1) turn by position * base^(-2i / d).
    """
    H, K = params["n_heads"], params.get("n_kv_heads", params["n_heads"])
    d = params["dim"] // H
    angles = torch.arange(tokens.shape[1])[:, None] * rope_base ** (-torch.arange(0, d, 2) / d)
    turn = torch.polar(torch.ones_like(angles), angles)[:, None, :]

    def norm(x, weight):
        return weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + params["norm_eps"])

    def rotate(x):
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * turn).flatten(-2)

    x = state["tok_embeddings.weight"][tokens]
    causal = torch.full((tokens.shape[1],) * 2, -torch.inf).triu(1)
    for n in range(params["n_layers"]):
        w = {name.split(".")[-2]: t for name, t in state.items() if name.startswith(f"layers.{n}.")}
        y = norm(x, w["attention_norm"])
        q = rotate((y @ w["wq"].T).unflatten(-1, (H, d)))
        k = rotate((y @ w["wk"].T).unflatten(-1, (K, d))).repeat_interleave(H // K, dim=2)
        v = (y @ w["wv"].T).unflatten(-1, (K, d)).repeat_interleave(H // K, dim=2)
        scores = torch.einsum("bthd,bshd->bhts", q, k) / d**0.5 + causal
        x = x + torch.einsum("bhts,bshd->bthd", scores.softmax(-1), v).flatten(-2) @ w["wo"].T
        y = norm(x, w["ffn_norm"])
        x = x + (torch.nn.functional.silu(y @ w["w1"].T) * (y @ w["w3"].T)) @ w["w2"].T
    return norm(x, state["norm.weight"]) @ state.get("output.weight", state["tok_embeddings.weight"]).T
