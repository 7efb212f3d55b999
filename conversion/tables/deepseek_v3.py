"""DeepSeek-V3 at Hugging Face, and its relatives: V2, with softmax, and Youtu, without experts."""

import math

from conversion.config_fields import DECODER, HFType, renamed, spellings, words
from conversion.gguf_latent import GGUF
from conversion.tables.llama import LAYOUT as LLAMA_LAYOUT
from conversion.tables.llama import PARALLEL as LLAMA_PARALLEL
from conversion.tables.llama import rope_base, rope_parameters, without
from conversion.tables.qwen3 import OPTIONAL, YARN, YARN_DEFAULTS, natural_scale
from conversion.tensor_table import Layout, Row, table
from models.utils.errors import UserError

__all__ = ["GGUF", "HF_TYPES", "LAYOUT", "to_hf_config"]

LAYER = table("""
    layers.{n}.attn_norm.weight                 model.layers.{n}.input_layernorm.weight
    layers.{n}.attn.q_proj.weight               model.layers.{n}.self_attn.q_proj.weight             rope_head
    layers.{n}.attn.q_down_proj.weight          model.layers.{n}.self_attn.q_a_proj.weight
    layers.{n}.attn.q_norm.weight               model.layers.{n}.self_attn.q_a_layernorm.weight
    layers.{n}.attn.q_up_proj.weight            model.layers.{n}.self_attn.q_b_proj.weight           rope_head
    layers.{n}.attn.kv_down_proj.weight         model.layers.{n}.self_attn.kv_a_proj_with_mqa.weight rope_end
    layers.{n}.attn.kv_norm.weight              model.layers.{n}.self_attn.kv_a_layernorm.weight
    layers.{n}.attn.kv_up                       model.layers.{n}.self_attn.kv_b_proj.weight          to_heads
    layers.{n}.attn.o_proj.weight               model.layers.{n}.self_attn.o_proj.weight
    layers.{n}.ffn_norm.weight                  model.layers.{n}.post_attention_layernorm.weight
    layers.{n}.ffn.gate_proj.weight             model.layers.{n}.mlp.gate_proj.weight
    layers.{n}.ffn.up_proj.weight               model.layers.{n}.mlp.up_proj.weight
    layers.{n}.ffn.down_proj.weight             model.layers.{n}.mlp.down_proj.weight
    layers.{n}.ffn.router.weight                model.layers.{n}.mlp.gate.weight
    layers.{n}.ffn.router_bias                  model.layers.{n}.mlp.gate.e_score_correction_bias
    layers.{n}.ffn.shared.gate_proj.weight      model.layers.{n}.mlp.shared_experts.gate_proj.weight
    layers.{n}.ffn.shared.up_proj.weight        model.layers.{n}.mlp.shared_experts.up_proj.weight
    layers.{n}.ffn.shared.down_proj.weight      model.layers.{n}.mlp.shared_experts.down_proj.weight
    layers.{n}.ffn.experts.{e}.gate_proj.weight model.layers.{n}.mlp.experts.{e}.gate_proj.weight
    layers.{n}.ffn.experts.{e}.up_proj.weight   model.layers.{n}.mlp.experts.{e}.up_proj.weight
    layers.{n}.ffn.experts.{e}.down_proj.weight model.layers.{n}.mlp.experts.{e}.down_proj.weight
""")

# The layer that looks ahead stands in their files as one more layer, with its own names beside a layer's.
AHEAD = [
    Row(row.ours.replace("layers.{n}.", "ahead.layer."), row.theirs.replace("{n}", "{end}"), row.transform)
    for row in LAYER
]

LAYOUT = Layout(
    prefix="model.",
    tied=LLAMA_LAYOUT.tied,
    rows=LAYER
    + AHEAD
    + table("""
        token_embed.weight                       model.embed_tokens.weight
        ahead.token_norm.weight                  model.layers.{end}.enorm.weight
        ahead.hidden_norm.weight                 model.layers.{end}.hnorm.weight
        ahead.join_proj.weight                   model.layers.{end}.eh_proj.weight
        ahead.final_norm.weight                  model.layers.{end}.shared_head.norm.weight
        final_norm.weight                        model.norm.weight
        lm_head.weight                           lm_head.weight
    """),
    copies={
        "model.layers.{end}.embed_tokens.weight": "model.embed_tokens.weight",
        "model.layers.{end}.shared_head.head.weight": "lm_head.weight",
    },
)

# What all heads read is whole: the narrow vectors of queries and of keys and values, and so the cache. What
# makes heads of them is split, attn.kv_up too. The shared expert is one part more of what experts add up to.
PARALLEL = LLAMA_PARALLEL | {
    "attn.q_up_proj": "columns",
    "ffn": "experts",
    "ffn.shared.gate_proj": "columns",
    "ffn.shared.up_proj": "columns",
    "ffn.shared.down_proj": "part",
}


def from_names(theirs, names):
    """Whether there is a layer that looks ahead. What transformers saves has none, though its config.json may
    name one: the tensors of a file decide, where they are known.
    """
    end = theirs.get("num_hidden_layers", DEEPSEEK_V3_TYPE.defaults["num_hidden_layers"])
    stored = f"model.layers.{end}.eh_proj.weight" in names
    return {"multi_token": stored if names else theirs.get("num_nextn_predict_layers", 1) > 0}


def num_heads(theirs):
    H, K = theirs["num_attention_heads"], theirs["num_key_value_heads"]
    if K not in (None, H):
        raise UserError(
            f"config.json: num_key_value_heads is {K}, num_attention_heads {H}; models/deepseek_v3.py "
            "implements as many of both"
        )
    return H


def dense_layers(theirs):
    return list(range(min(theirs["first_k_dense_replace"], theirs["num_hidden_layers"])))


def rope_scaling(theirs):
    """YaRN, or nothing, as models/qwen3.py, and what it does to all of a score."""
    parameters = rope_parameters(theirs)
    where = f"config.json: {'rope_scaling' if theirs['rope_scaling'] else 'rope_parameters'}"
    kind = parameters.pop("rope_type")
    if kind not in ("default", "yarn"):
        raise UserError(f"{where} has rope_type {kind!r}; models/deepseek_v3.py implements default and yarn")
    needed = {"rope_theta"} | (set(YARN) if kind == "yarn" else set())
    optional = {*OPTIONAL, *YARN_DEFAULTS, "mscale", "mscale_all_dim"} if kind == "yarn" else set()
    if missing := sorted(name for name in needed if parameters.get(name) is None):
        raise UserError(f"{where} of rope_type {kind} lacks {', '.join(missing)}")
    if unknown := sorted(set(parameters) - needed - optional):
        raise UserError(
            f"{where} of rope_type {kind}: models/deepseek_v3.py does not know {', '.join(unknown)}"
        )
    if kind == "default":
        return None
    given = {name: value for name, value in parameters.items() if value is not None}
    for name in (*YARN, *OPTIONAL, "mscale", "mscale_all_dim"):
        if type(given.get(name, 1)) not in (int, float):
            raise UserError(f"{where}: {name} is {given[name]!r}, where a number is expected")
    values = {"attention_factor": rotation_scale(given), **YARN_DEFAULTS, **given}
    if values["truncate"] is not True:
        raise UserError(f"{where}: truncate is {values['truncate']!r}; models/deepseek_v3.py implements true")
    scaling = {ours: values[name] for name, ours in (YARN | OPTIONAL).items()}
    return {**scaling, "score_mscale": given.get("mscale_all_dim") or None}


def rotation_scale(given):
    """What attention_factor, our rotation_scale, is where a file does not say it: mscale is for the features
    that turn, mscale_all_dim for all, so that those that turn get the ratio.
    """
    mscale, all_dim = given.get("mscale"), given.get("mscale_all_dim")
    if not (mscale and all_dim) or given["factor"] <= 1:
        return natural_scale(given["factor"])
    return (0.1 * mscale * math.log(given["factor"]) + 1) / (0.1 * all_dim * math.log(given["factor"]) + 1)


# What the published config.json says of its weights; conversion/fp8.py reads them.
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}

# What transformers reads nowhere, so that another value would pass it unseen.
UNREAD = {
    "topk_method": ("noaux_tc", None),
    "scoring_func": ("sigmoid", None),
    "moe_layer_freq": (1, None),
    "rope_interleave": (True, None),
    "num_nextn_predict_layers": (1, 0),
}

DEEPSEEK_V3_TYPE = HFType(
    model="deepseek_v3",
    used={
        "vocab_size": "vocab_size",
        "max_seq_len": "max_position_embeddings",
        "d_model": "hidden_size",
        "num_layers": "num_hidden_layers",
        "num_heads": num_heads,
        "d_query": "q_lora_rank",
        "d_latent": "kv_lora_rank",
        "head_dim": "qk_nope_head_dim",
        "rotary_dim": "qk_rope_head_dim",
        "value_dim": "v_head_dim",
        "d_ff": "intermediate_size",
        "d_expert": "moe_intermediate_size",
        "num_experts": "n_routed_experts",
        "num_active_experts": "num_experts_per_tok",
        "num_shared_experts": "n_shared_experts",
        "num_groups": "n_group",
        "num_active_groups": "topk_group",
        "normalize_weights": "norm_topk_prob",
        "weight_scale": "routed_scaling_factor",
        "dense_layers": dense_layers,
        "norm_eps": "rms_norm_eps",
        "rope_base": rope_base,
        "rope_scaling": rope_scaling,
        "tied_head": "tie_word_embeddings",
    },
    defaults={
        "vocab_size": 129280,
        "max_position_embeddings": 4096,
        "hidden_size": 7168,
        "num_hidden_layers": 61,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "n_routed_experts": 256,
        "num_experts_per_tok": 8,
        "n_shared_experts": 1,
        "n_group": 8,
        "topk_group": 4,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "first_k_dense_replace": 3,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "rope_scaling": {},
        "rope_parameters": {},
        "tie_word_embeddings": False,
    },
    must_equal={
        **DECODER,
        "hidden_act": spellings("silu"),
        "attention_bias": (False,),
        "pretraining_tp": (1,),
        **UNREAD,
    },
    fixed={"sigmoid_scores": True},
    # transformers computes the head's sizes from the others; the rest acts in training alone.
    inert=words("attention_dropout head_dim qk_head_dim aux_loss_alpha seq_aux ep_size output_router_logits"),
    token_ids={"bos_token_id": 0, "eos_token_id": 1},
    from_names=from_names,
    quantization=FP8,
)


def in_groups(name):
    """A field of V2's groups, which "greedy" leaves aside."""
    return lambda theirs: 1 if theirs["topk_method"] == "greedy" else theirs[name]


DEEPSEEK_V2_TYPE = HFType(
    model="deepseek_v3",
    used={
        **without(DEEPSEEK_V3_TYPE.used, "normalize_weights"),
        "num_groups": in_groups("n_group"),
        "num_active_groups": in_groups("topk_group"),
    },
    defaults={
        **without(DEEPSEEK_V3_TYPE.defaults, "norm_topk_prob"),
        "topk_method": "greedy",
        "n_group": None,
        "topk_group": None,
        "vocab_size": 102400,
        "max_position_embeddings": 2048,
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": None,
        "intermediate_size": 11008,
        "moe_intermediate_size": 1407,
        "n_routed_experts": 64,
        "num_experts_per_tok": None,
        "n_shared_experts": 2,
        "routed_scaling_factor": 1.0,
        "first_k_dense_replace": 0,
    },
    must_equal={
        **DEEPSEEK_V3_TYPE.must_equal,
        "mlp_bias": (False,),
        "topk_method": ("greedy", "group_limited_greedy"),
        "scoring_func": ("softmax", None),
        "norm_topk_prob": (False,),
        "num_nextn_predict_layers": (0,),
    },
    fixed={
        "sigmoid_scores": False,
        "normalize_weights": False,
        "multi_token": False,
    },
    inert=DEEPSEEK_V3_TYPE.inert,
    token_ids={"bos_token_id": 1, "eos_token_id": 2},
)

EXPERTS = words("""
    d_expert num_experts num_active_experts num_shared_experts num_groups num_active_groups normalize_weights
    weight_scale dense_layers
""")

YOUTU_TYPE = HFType(
    model="deepseek_v3",
    used={
        **without(DEEPSEEK_V3_TYPE.used, *EXPERTS),
        "dense_layers": lambda theirs: list(range(theirs["num_hidden_layers"])),
    },
    defaults={
        **without(
            DEEPSEEK_V3_TYPE.defaults,
            *(DEEPSEEK_V3_TYPE.used[name] for name in EXPERTS),
            "first_k_dense_replace",
        ),
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "hidden_size": 2048,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "intermediate_size": 6144,
        "tie_word_embeddings": True,
    },
    must_equal={
        **DECODER,
        "hidden_act": spellings("silu"),
        "attention_bias": (False,),
        "mlp_bias": (False,),
        "rope_interleave": (True, None),
    },
    # No layer has experts, so that their sizes say nothing.
    fixed={
        "d_expert": 1,
        "num_experts": 1,
        "num_active_experts": 1,
        "num_shared_experts": 1,
        "num_groups": 1,
        "num_active_groups": 1,
        "sigmoid_scores": True,
        "normalize_weights": True,
        "weight_scale": 1.0,
        "multi_token": False,
    },
    inert=words("attention_dropout head_dim qk_head_dim embedding_initializer_range"),
    token_ids={"bos_token_id": 128000, "eos_token_id": 128001},
)

HF_TYPES = {"deepseek_v3": DEEPSEEK_V3_TYPE, "deepseek_v2": DEEPSEEK_V2_TYPE, "youtu": YOUTU_TYPE}


def to_hf_config(config):
    """Without experts it is a Youtu, with softmax a DeepSeek-V2."""
    scaling = config["rope_scaling"]
    if scaling:
        scaling = {
            "rope_type": "yarn",
            **{name: scaling[ours] for name, ours in (YARN | OPTIONAL).items()},
            "mscale_all_dim": scaling["score_mscale"] or 0,
        }
    common = {
        "num_attention_heads": config["num_heads"],
        "num_key_value_heads": config["num_heads"],
        "hidden_act": "silu",
        "rope_theta": config["rope_base"],
        "rope_scaling": scaling,
    }
    if len(config["dense_layers"]) == config["num_layers"]:
        kind = {"architectures": ["YoutuForCausalLM"], "model_type": "youtu"}
        return {**kind, **renamed(YOUTU_TYPE, config), **common}
    if not config["sigmoid_scores"]:
        kind, hf_type = (
            {"architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2"},
            DEEPSEEK_V2_TYPE,
        )
        special = {
            "topk_method": "greedy" if config["num_groups"] == 1 else "group_limited_greedy",
            "norm_topk_prob": False,
            "n_group": config["num_groups"],
            "topk_group": config["num_active_groups"],
        }
    else:
        kind, hf_type = (
            {"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3"},
            DEEPSEEK_V3_TYPE,
        )
        special = {"num_nextn_predict_layers": int(config["multi_token"])}
    return {
        **kind,
        **renamed(hf_type, config),
        "first_k_dense_replace": len(config["dense_layers"]),
        **special,
        **common,
    }
