"""models/modular_decoder.py at Hugging Face: Llama, Qwen3 and Mixtral, each a choice of components.

They are read by this page where `convert_hf_checkpoint.py --model modular_decoder` asks for it.
A decoder of other components has no model_type there, and is not written in that layout.
"""

import inspect
from types import SimpleNamespace

from conversion.config_fields import DECODER, HFType, read_config, spellings, words
from conversion.tables import llama, qwen3
from conversion.tables.llama import LLAMA_TYPE, ROPE_SCALING, without
from conversion.tables.qwen3 import QWEN3_TYPE
from conversion.tensor_table import Computed, Layout, table
from models import modular_decoder as page
from models.utils.errors import UserError


def frequencies(config):
    """(d // 2,) of RoPE, scaled as the page scales them."""
    section = complete(config["attention"], config["d_model"])
    attn = SimpleNamespace(**section | {"rope_scaling": page.read_scaling(section["rope_scaling"])})
    return page.rope_frequencies(attn, "cpu")


LAYOUT = Layout(
    prefix="model.",
    computed={name: Computed("RoPE's frequencies", frequencies) for name in llama.LAYOUT.computed},
    tied=llama.LAYOUT.tied,
    rows=qwen3.LAYOUT.rows
    + table("""
        layers.{n}.ffn.router.weight                  model.layers.{n}.block_sparse_moe.gate.weight
        layers.{n}.ffn.experts.{e}.gate_proj.weight   model.layers.{n}.block_sparse_moe.experts.{e}.w1.weight
        layers.{n}.ffn.experts.{e}.up_proj.weight     model.layers.{n}.block_sparse_moe.experts.{e}.w3.weight
        layers.{n}.ffn.experts.{e}.down_proj.weight   model.layers.{n}.block_sparse_moe.experts.{e}.w2.weight
    """),
)

PARALLEL = qwen3.PARALLEL | {"ffn": "experts"}


# Their fields -> a section ----------------------------------------------------------------------------------


def attention(theirs):
    section = {
        "@attention": "PagedAttention",
        "num_heads": theirs["num_attention_heads"],
        "head_dim": llama.head_dim(theirs),
        "num_query_groups": llama.num_kv_heads(theirs),
        "rope_base": llama.rope_base(theirs),
    }
    if scaling := llama.rope_scaling(theirs, "models/modular_decoder.py"):
        section["rope_scaling"] = scaling
    if theirs.get("attention_bias"):
        section |= dict.fromkeys(("q_bias", "k_bias", "v_bias", "o_bias"), True)
    return section


def normed_attention(theirs):
    section = attention(theirs)
    return section | {name: {**norm(theirs), "in_dim": section["head_dim"]} for name in ("q_norm", "k_norm")}


def norm(theirs):
    return {"@normalization": "RMSNorm", "eps": theirs["rms_norm_eps"]}


def feedforward(theirs):
    biases = dict.fromkeys(("gate_bias", "up_bias", "down_bias"), True) if theirs.get("mlp_bias") else {}
    return {"@feedforward": "SwiGLU", "hidden_dim": theirs["intermediate_size"], **biases}


def mixture(theirs):
    active, experts = theirs["num_experts_per_tok"], theirs["num_local_experts"]
    if active > experts:
        raise UserError(f"config.json: num_experts_per_tok is {active}, where there are {experts} experts")
    counts = {"num_experts": experts, "num_active_experts": active}
    return {"@feedforward": "MixtureOfExperts", **counts, "expert": feedforward(theirs)}


LLAMA = HFType(
    model="modular_decoder",
    used={
        "vocab_size": "vocab_size",
        "max_seq_len": "max_position_embeddings",
        "d_model": "hidden_size",
        "num_layers": "num_hidden_layers",
        "attention": attention,
        "feedforward": feedforward,
        "norm": norm,
        "tied_head": "tie_word_embeddings",
    },
    defaults=LLAMA_TYPE.defaults,
    must_equal=LLAMA_TYPE.must_equal,
    inert=LLAMA_TYPE.inert,
    fixed={"prenorm": True},
    token_ids=LLAMA_TYPE.token_ids,
    by_name_only=True,
)

QWEN3 = HFType(
    model="modular_decoder",
    used={**LLAMA.used, "attention": normed_attention},
    defaults=QWEN3_TYPE.defaults,
    must_equal=QWEN3_TYPE.must_equal,
    inert=QWEN3_TYPE.inert,
    fixed={"prenorm": True},
    by_name_only=True,
)

MIXTRAL = HFType(
    model="modular_decoder",
    used={**LLAMA.used, "feedforward": mixture},
    defaults={
        **without(LLAMA_TYPE.defaults, "attention_bias", "mlp_bias"),
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1_000_000.0,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    must_equal={**DECODER, "hidden_act": spellings("silu"), "sliding_window": (None,)},
    # The router's noise and its loss act in training alone.
    inert=words("attention_dropout output_router_logits router_aux_loss_coef router_jitter_noise"),
    fixed={"prenorm": True},
    token_ids={"bos_token_id": 1, "eos_token_id": 2},
    by_name_only=True,
)

HF_TYPES = {"llama": LLAMA, "qwen3": QWEN3, "mixtral": MIXTRAL}
CLASSES = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM", "mixtral": "MixtralForCausalLM"}


# And back ---------------------------------------------------------------------------------------------------


def to_hf_config(config):
    """In the words of the model_type that, read again, gives the same config."""
    ours = {name: complete(value, config["d_model"]) for name, value in config.items()}
    for model_type, hf_type in HF_TYPES.items():
        theirs = their_fields(ours, model_type)
        read = read_config(hf_type, theirs)
        if all(complete(read[name], read["d_model"]) == ours[name] for name in read):
            return theirs
    names = ", ".join(next(iter(config[part].values())) for part in ("attention", "feedforward", "norm"))
    raise UserError(
        f"Hugging Face has no model_type for a decoder of {names} as they are set here; its Llama, Qwen3 and "
        "Mixtral have PagedAttention, SwiGLU (also as experts) and RMSNorm"
    )


def complete(section, d_model):
    """A section with the fields that it leaves out; what is no section stays as it is."""
    if not isinstance(section, dict) or not (kinds := [name for name in section if name.startswith("@")]):
        return section
    component = vars(page.Registry)[kinds[0][1:]].get(section[kinds[0]])
    known = inspect.signature(component).parameters
    defaults = {name: p.default for name, p in known.items() if p.default is not p.empty}
    inner = {name: complete(value, d_model) for name, value in section.items()}
    full = {**defaults, **inner}
    if "num_heads" in full:
        full["head_dim"] = full["head_dim"] or d_model // full["num_heads"]
        full["num_query_groups"] = full["num_query_groups"] or full["num_heads"]
    return full


def their_fields(ours, model_type):
    """What a config.json of a model_type would say of our config, if that type has all of it."""
    attention, feedforward = ours["attention"], ours["feedforward"]
    expert, scaling = feedforward.get("expert", feedforward), attention.get("rope_scaling")
    if scaling:
        scaling = {
            "rope_type": "llama3",
            **{theirs: scaling.get(our) for our, theirs in ROPE_SCALING.items()},
        }
    fields = {
        "architectures": [CLASSES[model_type]],
        "model_type": model_type,
        **{theirs: ours[our] for our, theirs in LLAMA.used.items() if isinstance(theirs, str)},
        "num_attention_heads": attention.get("num_heads", 1),
        "num_key_value_heads": attention.get("num_query_groups", 1),
        "head_dim": attention.get("head_dim", 1),
        "intermediate_size": expert.get("hidden_dim", 1),
        "rms_norm_eps": ours["norm"].get("eps", 1.0),
        "hidden_act": "silu",
        "rope_theta": attention.get("rope_base") or 1.0,
        "rope_scaling": scaling,
    }
    if model_type == "mixtral":
        counts = {name: feedforward.get(name, 1) for name in ("num_experts", "num_active_experts")}
        return {
            **fields,
            "num_local_experts": counts["num_experts"],
            "num_experts_per_tok": counts["num_active_experts"],
        }
    if model_type == "llama":
        biases = {"attention_bias": bool(attention.get("q_bias")), "mlp_bias": bool(expert.get("up_bias"))}
        return {**fields, **biases}
    return fields
