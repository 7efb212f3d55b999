"""Qwen3 at Hugging Face, for a page of the test that adds pages: read where --model asks for it."""

from conversion.config_fields import DECODER, HFType, renamed, words
from conversion.tables.llama import rope_parameters
from conversion.tensor_table import Layout, table
from models.utils.errors import UserError

LAYOUT = Layout(
    prefix="model.",
    tied=lambda config: {"lm_head.weight": "token_embed.weight"} if config["tied_head"] else {},
    rows=table("""
        token_embed.weight                   model.embed_tokens.weight
        layers.{n}.attn_norm.weight          model.layers.{n}.input_layernorm.weight
        layers.{n}.attn.q_proj.weight        model.layers.{n}.self_attn.q_proj.weight
        layers.{n}.attn.k_proj.weight        model.layers.{n}.self_attn.k_proj.weight
        layers.{n}.attn.v_proj.weight        model.layers.{n}.self_attn.v_proj.weight
        layers.{n}.attn.o_proj.weight        model.layers.{n}.self_attn.o_proj.weight
        layers.{n}.attn.q_norm.weight        model.layers.{n}.self_attn.q_norm.weight
        layers.{n}.attn.k_norm.weight        model.layers.{n}.self_attn.k_norm.weight
        layers.{n}.ffn_norm.weight           model.layers.{n}.post_attention_layernorm.weight
        layers.{n}.ffn.gate_proj.weight      model.layers.{n}.mlp.gate_proj.weight
        layers.{n}.ffn.up_proj.weight        model.layers.{n}.mlp.up_proj.weight
        layers.{n}.ffn.down_proj.weight      model.layers.{n}.mlp.down_proj.weight
        final_norm.weight                    model.norm.weight
        lm_head.weight                       lm_head.weight
    """),
)


def num_kv_heads(theirs):
    return theirs["num_key_value_heads"] or theirs["num_attention_heads"]


def rope_base(theirs):
    parameters = rope_parameters(theirs)
    if set(parameters) != {"rope_theta", "rope_type"} or parameters["rope_type"] != "default":
        raise UserError(f"config.json: RoPE is {parameters}; models/normed_decoder.py implements rope_theta")
    return parameters["rope_theta"]


QWEN3 = HFType(
    model="normed_decoder",
    used={
        "vocab_size": "vocab_size",
        "max_seq_len": "max_position_embeddings",
        "d_model": "hidden_size",
        "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "num_kv_heads": num_kv_heads,
        "head_dim": "head_dim",
        "d_ff": "intermediate_size",
        "norm_eps": "rms_norm_eps",
        "rope_base": rope_base,
        "tied_head": "tie_word_embeddings",
    },
    defaults={
        "vocab_size": 151936,
        "max_position_embeddings": 32768,
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "intermediate_size": 22016,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "rope_scaling": {},
        "rope_parameters": {},
        "tie_word_embeddings": False,
    },
    must_equal={
        **DECODER,
        "hidden_act": ("silu",),
        "attention_bias": (False,),
        "use_sliding_window": (False,),
        "layer_types": ("full_attention", None),
    },
    # The two about windows are read where use_sliding_window is true, and nowhere else.
    inert=words("attention_dropout sliding_window max_window_layers"),
    by_name_only=True,
)

HF_TYPES = {"qwen3": QWEN3}


def to_hf_config(config):
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        **renamed(QWEN3, config),
        "num_key_value_heads": config["num_kv_heads"],
        "hidden_act": "silu",
        "rope_theta": config["rope_base"],
    }
