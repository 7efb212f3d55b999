"""Mixtral at Hugging Face, for a page of the test that adds pages: read where --model asks for it."""

from conversion.config_fields import DECODER, HFType, renamed, words
from conversion.tables.llama import head_dim, num_kv_heads, rope_parameters
from conversion.tensor_table import Layout, table
from models.utils.errors import UserError

LAYOUT = Layout(
    prefix="model.",
    rows=table("""
        token_embed.weight                            model.embed_tokens.weight
        layers.{n}.attn_norm.weight                   model.layers.{n}.input_layernorm.weight
        layers.{n}.attn.q_proj.weight                 model.layers.{n}.self_attn.q_proj.weight
        layers.{n}.attn.k_proj.weight                 model.layers.{n}.self_attn.k_proj.weight
        layers.{n}.attn.v_proj.weight                 model.layers.{n}.self_attn.v_proj.weight
        layers.{n}.attn.o_proj.weight                 model.layers.{n}.self_attn.o_proj.weight
        layers.{n}.ffn_norm.weight                    model.layers.{n}.post_attention_layernorm.weight
        layers.{n}.ffn.router.weight                  model.layers.{n}.block_sparse_moe.gate.weight
        layers.{n}.ffn.experts.{e}.gate_proj.weight   model.layers.{n}.block_sparse_moe.experts.{e}.w1.weight
        layers.{n}.ffn.experts.{e}.up_proj.weight     model.layers.{n}.block_sparse_moe.experts.{e}.w3.weight
        layers.{n}.ffn.experts.{e}.down_proj.weight   model.layers.{n}.block_sparse_moe.experts.{e}.w2.weight
        final_norm.weight                             model.norm.weight
        lm_head.weight                                lm_head.weight
    """),
)


def rope_base(theirs):
    parameters = rope_parameters(theirs)
    if set(parameters) != {"rope_theta", "rope_type"} or parameters["rope_type"] != "default":
        raise UserError(f"config.json: RoPE is {parameters}; models/routed_decoder.py implements rope_theta")
    return parameters["rope_theta"]


MIXTRAL = HFType(
    model="routed_decoder",
    used={
        "vocab_size": "vocab_size",
        "max_seq_len": "max_position_embeddings",
        "d_model": "hidden_size",
        "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "num_kv_heads": num_kv_heads,
        "head_dim": head_dim,
        "d_ff": "intermediate_size",
        "num_experts": "num_local_experts",
        "num_active_experts": "num_experts_per_tok",
        "norm_eps": "rms_norm_eps",
        "rope_base": rope_base,
    },
    defaults={
        "vocab_size": 32000,
        "max_position_embeddings": 131072,
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": None,
        "intermediate_size": 14336,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1_000_000.0,
        "rope_scaling": {},
        "rope_parameters": {},
    },
    must_equal={
        **DECODER,
        "hidden_act": ("silu",),
        "sliding_window": (None,),
        "tie_word_embeddings": (False,),
    },
    # The router's noise and its loss act in training alone.
    inert=words("attention_dropout output_router_logits router_aux_loss_coef router_jitter_noise"),
    token_ids={"bos_token_id": 1, "eos_token_id": 2},
    by_name_only=True,
)

HF_TYPES = {"mixtral": MIXTRAL}


def to_hf_config(config):
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        **renamed(MIXTRAL, config),
        "num_key_value_heads": config["num_kv_heads"],
        "head_dim": config["head_dim"],
        "hidden_act": "silu",
        "rope_theta": config["rope_base"],
    }
