"""GPT-NeoX at Hugging Face, which Pythia's checkpoints share: its tensors, the fields of its config.json."""

import math

from conversion.config_fields import DECODER, HFType, activation_named, checked_value, renamed, words
from conversion.gguf_table import LAYER_NORM, GGUFType
from conversion.tables import llama
from conversion.tensor_table import Computed, Layout, rope_frequencies, table
from models.utils.errors import UserError

# post_attention_layernorm is the norm before the feed-forward, also where both sublayers run in parallel.
LAYOUT = Layout(
    prefix="gpt_neox.",
    # Files say embed_out, whoever wrote them; in memory transformers 5 says lm_head.
    old_endings={"lm_head.weight": "embed_out.weight"},
    skipped={
        "gpt_neox.layers.{n}.attention.bias": "the causal mask, a triangle of ones",
        "gpt_neox.layers.{n}.attention.masked_bias": "what old versions put where the mask is 0",
    },
    computed=dict.fromkeys(
        ("gpt_neox.layers.{n}.attention.rotary_emb.inv_freq", "gpt_neox.rotary_emb.inv_freq"),
        Computed(
            "RoPE's frequencies, computed from rope_base",
            lambda config: rope_frequencies(config["rope_base"], config["rotary_dim"]),
        ),
    ),
    tied=lambda config: {"lm_head.weight": "token_embed.weight"} if config["tied_head"] else {},
    rows=table("""
        token_embed.weight                   gpt_neox.embed_in.weight
        layers.{n}.attn_norm.{p}             gpt_neox.layers.{n}.input_layernorm.{p}
        layers.{n}.attn.{q,k,v}_proj.{p}     gpt_neox.layers.{n}.attention.query_key_value.{p}  split_per_head
        layers.{n}.attn.o_proj.{p}           gpt_neox.layers.{n}.attention.dense.{p}
        layers.{n}.ffn_norm.{p}              gpt_neox.layers.{n}.post_attention_layernorm.{p}
        layers.{n}.ffn.up_proj.{p}           gpt_neox.layers.{n}.mlp.dense_h_to_4h.{p}
        layers.{n}.ffn.down_proj.{p}         gpt_neox.layers.{n}.mlp.dense_4h_to_h.{p}
        final_norm.{p}                       gpt_neox.final_layer_norm.{p}
        lm_head.weight                       embed_out.weight
    """),
)


GGUF = {
    "gptneox": GGUFType(
        ("gpt_neox",),
        fields={**LAYER_NORM, "parallel_residual": "use_parallel_residual"},
        wants_head=True,
    )
}

PARALLEL = llama.PARALLEL


def rotary_dim(theirs):
    """How many of a head's features RoPE turns: a fraction of them, rounded down."""
    fraction = checked_value("rotary_pct", rope_parameters(theirs)["partial_rotary_factor"], 0.25)
    head_dim = theirs["hidden_size"] // theirs["num_attention_heads"]
    features = int(head_dim * fraction) if 0 < fraction < 1000 else 0
    if not 0 < features <= head_dim or features % 2:
        raise UserError(
            f"config.json: rotary_pct is {fraction}, which is {features} of a head's {head_dim} features; "
            f"models/gpt_neox.py turns pairs, so this must be an even number from 2 to {head_dim}"
        )
    return features


def rope_base(theirs):
    return checked_value("rotary_emb_base", rope_parameters(theirs)["rope_theta"], 10000.0)


def rope_parameters(theirs):
    """In published files rotary_pct and rotary_emb_base; in new ones rope_parameters, which goes before."""
    inner = theirs["rope_scaling"] or theirs["rope_parameters"] or {}
    parameters = {
        "rope_theta": theirs["rotary_emb_base"],
        "partial_rotary_factor": theirs["rotary_pct"],
        "rope_type": inner.get("type", "default"),
        **inner,
    }
    parameters.pop("type", None)
    strange = set(parameters) - {"rope_theta", "partial_rotary_factor", "rope_type"}
    if parameters["rope_type"] != "default" or strange:
        where = "rope_scaling" if theirs["rope_scaling"] else "rope_parameters"
        raise UserError(
            f"config.json: {where} is {inner}; models/gpt_neox.py implements rope_type default, with "
            "rope_theta and partial_rotary_factor"
        )
    return parameters


def gelu_approximation(theirs):
    name = activation_named(theirs, "hidden_act", "models/gpt_neox.py", ("gelu", "gelu_new"))
    return {"gelu": "none", "gelu_new": "tanh"}[name]


GPT_NEOX_TYPE = HFType(
    model="gpt_neox",
    used={
        "vocab_size": "vocab_size",
        "max_seq_len": "max_position_embeddings",
        "d_model": "hidden_size",
        "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "d_ff": "intermediate_size",
        "norm_eps": "layer_norm_eps",
        "rotary_dim": rotary_dim,
        "rope_base": rope_base,
        "parallel_residual": "use_parallel_residual",
        "gelu_approximation": gelu_approximation,
        "attn_bias": "attention_bias",
        "tied_head": "tie_word_embeddings",
    },
    defaults={
        "vocab_size": 50432,
        "max_position_embeddings": 2048,
        "hidden_size": 6144,
        "num_hidden_layers": 44,
        "num_attention_heads": 64,
        "intermediate_size": 24576,
        "layer_norm_eps": 1e-5,
        "rotary_pct": 0.25,
        "rotary_emb_base": 10000.0,
        "rope_scaling": {},
        "rope_parameters": {},
        "use_parallel_residual": True,
        "hidden_act": "gelu",
        "attention_bias": True,
        "tie_word_embeddings": False,
    },
    must_equal=DECODER,
    # Dropout acts in training alone, and models/gpt_neox.py has none.
    inert=words("""
        attention_dropout hidden_dropout classifier_dropout attention_probs_dropout_prob hidden_dropout_prob
    """),
    token_ids={"bos_token_id": 0, "eos_token_id": 2},
)

HF_TYPES = {"gpt_neox": GPT_NEOX_TYPE}


def to_hf_config(config):
    return {
        "architectures": ["GPTNeoXForCausalLM"],
        "model_type": "gpt_neox",
        **renamed(GPT_NEOX_TYPE, config),
        "hidden_act": {"none": "gelu", "tanh": "gelu_fast"}[config["gelu_approximation"]],
        "rotary_pct": rotary_pct(config),
        "rotary_emb_base": config["rope_base"],
    }


def rotary_pct(config):
    """The fraction of head_dim that, multiplied and rounded down, is rotary_dim: int(98 * (2 / 98)) is 1."""
    head_dim = config["d_model"] // config["num_heads"]
    fraction = config["rotary_dim"] / head_dim
    return fraction if int(head_dim * fraction) == config["rotary_dim"] else math.nextafter(fraction, 1)
