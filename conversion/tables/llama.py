"""Llama at Hugging Face, and its relatives of the same architecture: Mistral and Qwen2.

The page to read before writing another: everything that a checkpoint says has its place here.

LAYOUT is the table of the tensors: a line for each kind of ours, where it stands in their file, and a
    transform where it does not come over as it is (conversion/tensor_table.py). `computed` are tensors that
    files hold though they follow from the config; they are compared, not kept. `tied` are those of ours that
    share another's numbers.
An HFType sorts the fields of config.json for one model_type:
    used          our field <- their field, or a function of their fields
    defaults      every field that `used` reads, with what transformers takes where a file is silent
    must_equal    their field: the values that our page implements, silence being the first of them; another
                  value stops the conversion
    silence       where silence means a value that our page does not implement
    fixed         our field: the value, where their code leaves no choice
    inert         fields on which the logits of a trained model do not depend
    token_ids     special tokens where config.json is silent
Any other field stops the conversion, since it may mean anything. to_hf_config is the way back.

PARALLEL says how several devices share a decoder: which modules they split, by the end of our name, and how
    (runs_parallel/tensor_parallel.py). None: this model cannot be split.
"""

import math

import torch

import models.llama as model_page
from conversion.config_fields import DECODER, HFType, renamed, spellings, words
from conversion.gguf_table import GGUFType
from conversion.tensor_table import Computed, Layout, rope_frequencies, table
from models import config_from_dict
from models.utils.errors import UserError


def frequencies(config):
    """(d // 2,), scaled as the page scales them; None for a transformer_lm without RoPE, which reads none."""
    if config.get("rope_scaling") is None:
        return rope_frequencies(config["rope_base"], config["head_dim"]) if config["rope_base"] else None
    _, built = config_from_dict(config, "config.json")
    return model_page.rope_frequencies(built, "cpu")


# post_attention_layernorm is the norm before the feed-forward: its name says what comes before it.
LAYOUT = Layout(
    prefix="model.",
    computed=dict.fromkeys(
        ("model.layers.{n}.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"),
        Computed("RoPE's frequencies, computed from rope_base", frequencies),
    ),
    tied=lambda config: {"lm_head.weight": "token_embed.weight"} if config["tied_head"] else {},
    rows=table("""
        token_embed.weight                   model.embed_tokens.weight
        layers.{n}.attn_norm.weight          model.layers.{n}.input_layernorm.weight
        layers.{n}.attn.q_proj.{p}           model.layers.{n}.self_attn.q_proj.{p}
        layers.{n}.attn.k_proj.{p}           model.layers.{n}.self_attn.k_proj.{p}
        layers.{n}.attn.v_proj.{p}           model.layers.{n}.self_attn.v_proj.{p}
        layers.{n}.attn.o_proj.{p}           model.layers.{n}.self_attn.o_proj.{p}
        layers.{n}.ffn_norm.weight           model.layers.{n}.post_attention_layernorm.weight
        layers.{n}.ffn.gate_proj.{p}         model.layers.{n}.mlp.gate_proj.{p}
        layers.{n}.ffn.up_proj.{p}           model.layers.{n}.mlp.up_proj.{p}
        layers.{n}.ffn.down_proj.{p}         model.layers.{n}.mlp.down_proj.{p}
        final_norm.weight                    model.norm.weight
        lm_head.weight                       lm_head.weight
    """),
)

PARALLEL = {
    "attn": "heads",
    "attn.q_proj": "columns",
    "attn.k_proj": "columns",
    "attn.v_proj": "columns",
    "attn.o_proj": "rows",
    "ffn.gate_proj": "columns",
    "ffn.up_proj": "columns",
    "ffn.down_proj": "rows",
    "lm_head": "vocabulary",
}


def head_dim(theirs):
    return theirs["head_dim"] or theirs["hidden_size"] // theirs["num_attention_heads"]


def num_kv_heads(theirs):
    return theirs["num_key_value_heads"] or theirs["num_attention_heads"]


def rope_base(theirs):
    return rope_parameters(theirs)["rope_theta"]


def rope_scaling(theirs, page="models/llama.py"):
    """Llama 3.1's scaling is the one that models/llama.py implements."""
    parameters = rope_parameters(theirs)
    where = f"config.json: {'rope_scaling' if theirs['rope_scaling'] else 'rope_parameters'}"
    kind = parameters.pop("rope_type")
    if kind not in ("default", "llama3"):
        raise UserError(f"{where} has rope_type {kind!r}; {page} implements default and llama3")
    names = list(ROPE_SCALING.values()) if kind == "llama3" else []
    strange = set(parameters).symmetric_difference({"rope_theta", *names})
    if strange:
        wanted = ", ".join(names) or "nothing more"
        raise UserError(f"{where} of rope_type {kind} has {wanted}; amiss here: {', '.join(sorted(strange))}")
    return {ours: parameters[name] for ours, name in ROPE_SCALING.items()} if names else None


ROPE_SCALING = {
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_max_seq_len": "original_max_position_embeddings",
}


def write_qwen2(config):
    """llama.cpp's Qwen2 has heads that are d_model wide together, as all published ones, and a plain RoPE."""
    if config["num_heads"] * config["head_dim"] != config["d_model"] or config["rope_scaling"]:
        raise UserError(
            "num_heads times head_dim is d_model in llama.cpp's qwen2, and rope_scaling null; this model is "
            "not written as GGUF"
        )
    return {}


# llama.cpp's architectures, see conversion/gguf_table.py. The rows of a Llama's q and k it keeps as Meta
# does, for a RoPE that turns neighbours; that name serves Mistral as well.
GGUF = {
    "llama": GGUFType(
        ("llama", "mistral"),
        transforms={"q_proj.{p}": "pairs_to_halves", "k_proj.{p}": "pairs_to_halves"},
    ),
    "qwen2": GGUFType(("qwen2",), write=write_qwen2),
}


def scaling_of(divisors, config, where):
    """Llama 3.1's scaling of RoPE, of which llama.cpp keeps by what each pair's frequency is divided.

    From 1 to factor, a blend s of the two tells how often its pair turns in the context of pre-training:
    low_freq_factor + s (high_freq_factor - low_freq_factor) times, where all published files say 1 and 4.
    """
    scaling = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_seq_len": 8192}
    scaling = {"factor": divisors.max().item(), **scaling}
    plain = scaled_frequencies(config, None, where)
    if plain.shape == divisors.shape and scaling["factor"] > 1:
        blend = (1 / divisors - 1 / scaling["factor"]) / (1 - 1 / scaling["factor"])
        between = (blend > 0.01) & (blend < 0.99)
        lengths = (1 + 3 * blend[between]) * 2 * math.pi / plain[between]
        if len(lengths):
            scaling["original_max_seq_len"] = round(lengths.median().item())
        if torch.allclose(plain / scaled_frequencies(config, scaling, where), divisors, rtol=1e-3):
            return scaling
    raise UserError(f"{where}: rope_freqs.weight is no scaling of Llama 3.1's; models/llama.py has no other")


def scaled_frequencies(config, scaling, where):
    config = config_from_dict({**config, "rope_scaling": scaling}, where)[1]
    return model_page.rope_frequencies(config, torch.device("cpu"))


def rope_parameters(theirs):
    """RoPE's fields: in the old form rope_theta and rope_scaling, in the new one all inside rope_parameters.

    Where they compete, the same wins as in transformers: rope_scaling, and a rope_theta inside it.
    """
    inner = theirs["rope_scaling"] or theirs["rope_parameters"] or {}
    parameters = {"rope_theta": theirs["rope_theta"], "rope_type": inner.get("type", "default"), **inner}
    parameters.pop("type", None)
    if parameters["rope_type"] == "llama3":
        parameters.setdefault("original_max_position_embeddings", theirs["max_position_embeddings"])
    if parameters.get("partial_rotary_factor") in (None, 1):
        parameters.pop("partial_rotary_factor", None)
    return parameters


def without(fields, *names):
    return {name: value for name, value in fields.items() if name not in names}


LLAMA_TYPE = HFType(
    model="llama",
    used={
        "vocab_size": "vocab_size",
        "max_seq_len": "max_position_embeddings",
        "d_model": "hidden_size",
        "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "num_kv_heads": num_kv_heads,
        "head_dim": head_dim,
        "d_ff": "intermediate_size",
        "norm_eps": "rms_norm_eps",
        "rope_base": rope_base,
        "rope_scaling": rope_scaling,
        "qkv_bias": "attention_bias",
        "o_bias": "attention_bias",
        "ffn_bias": "mlp_bias",
        "tied_head": "tie_word_embeddings",
    },
    defaults={
        "vocab_size": 32000,
        "max_position_embeddings": 2048,
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": None,
        "head_dim": None,
        "intermediate_size": 11008,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "rope_scaling": {},
        "rope_parameters": {},
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
    },
    must_equal={
        **DECODER,
        "hidden_act": spellings("silu"),
        "pretraining_tp": (1,),
        "rope_interleaved": (False,),
    },
    # attention_dropout acts in training alone, and models/llama.py has no dropout.
    inert=words("attention_dropout is_llama_config"),
    token_ids={"bos_token_id": 1, "eos_token_id": 2},
)


MISTRAL_TYPE = HFType(
    model="llama",
    used=without(LLAMA_TYPE.used, "qkv_bias", "o_bias", "ffn_bias"),
    defaults={
        **without(LLAMA_TYPE.defaults, "attention_bias", "mlp_bias"),
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
    },
    must_equal={**DECODER, "hidden_act": spellings("silu"), "sliding_window": (None,)},
    # Without the field, the window is 4096 positions wide; Mistral 7B says null from version 0.2 on.
    silence={"sliding_window": 4096},
    inert={"attention_dropout"},
    fixed={"qkv_bias": False, "o_bias": False, "ffn_bias": False},
    token_ids={"bos_token_id": 1, "eos_token_id": 2},
)

QWEN2_TYPE = HFType(
    model="llama",
    used=MISTRAL_TYPE.used,
    defaults={
        **without(LLAMA_TYPE.defaults, "attention_bias", "mlp_bias"),
        "vocab_size": 151936,
        "max_position_embeddings": 32768,
        "num_key_value_heads": 32,
        "intermediate_size": 22016,
    },
    must_equal={
        **DECODER,
        "hidden_act": spellings("silu"),
        "use_sliding_window": (False,),
        "layer_types": ("full_attention", None),
        "use_mrope": (False,),
    },
    # The two about windows are read where use_sliding_window is true, and nowhere else.
    inert=words("attention_dropout sliding_window max_window_layers"),
    fixed={"qkv_bias": True, "o_bias": False, "ffn_bias": False},
)

HF_TYPES = {"llama": LLAMA_TYPE, "mistral": MISTRAL_TYPE, "qwen2": QWEN2_TYPE}


def to_hf_config(config):
    """Biases decide the model_type: Qwen2 has them on q, k and v, Llama on all four projections or none."""
    biases = {name: config[name] for name in ("qkv_bias", "o_bias", "ffn_bias")}
    if biases == QWEN2_TYPE.fixed:
        kind, hf_type = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}, QWEN2_TYPE
    elif biases["qkv_bias"] == biases["o_bias"]:
        kind, hf_type = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}, LLAMA_TYPE
    else:
        raise UserError(f"no model_type of Hugging Face has the biases {biases}")
    scaling = config["rope_scaling"]
    if scaling:
        scaling = {"rope_type": "llama3", **{theirs: scaling[ours] for ours, theirs in ROPE_SCALING.items()}}
    return {
        **kind,
        **renamed(hf_type, config),
        "num_key_value_heads": config["num_kv_heads"],
        "head_dim": config["head_dim"],
        "hidden_act": "silu",
        "rope_theta": config["rope_base"],
        "rope_scaling": scaling,
    }
