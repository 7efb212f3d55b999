"""Qwen3-MoE at Hugging Face: Qwen3's names, and for each expert three matrices of its own.

The files hold a tensor per expert and matrix, as we do; transformers stacks them when it loads a file.
"""

from conversion.config_fields import HFType, renamed
from conversion.gguf_table import EXPERTS, YARN_FIELDS, GGUFType, read_yarn, write_yarn
from conversion.tables import qwen3
from conversion.tables.qwen3 import QWEN3_TYPE
from conversion.tensor_table import Layout, table
from models.utils.errors import UserError

LAYOUT = Layout(
    prefix="model.",
    tied=qwen3.LAYOUT.tied,
    rows=qwen3.LAYOUT.rows
    + table("""
        layers.{n}.ffn.router.weight                  model.layers.{n}.mlp.gate.weight
        layers.{n}.ffn.experts.{e}.gate_proj.weight   model.layers.{n}.mlp.experts.{e}.gate_proj.weight
        layers.{n}.ffn.experts.{e}.up_proj.weight     model.layers.{n}.mlp.experts.{e}.up_proj.weight
        layers.{n}.ffn.experts.{e}.down_proj.weight   model.layers.{n}.mlp.experts.{e}.down_proj.weight
    """),
)

# The router stays whole: every rank knows who was chosen.
PARALLEL = qwen3.PARALLEL | {"ffn": "experts"}


def write_experts(config):
    """What a GGUF file says beside the sizes; llama.cpp's Qwen3-MoE has no other experts than these."""
    if config["dense_layers"] or not config["normalize_weights"]:
        raise UserError(
            "llama.cpp has experts in every layer of a qwen3moe, with weights that add up to 1; this model "
            "has not, and is not written as GGUF"
        )
    return write_yarn(config["rope_scaling"])


GGUF = {
    "qwen3moe": GGUFType(
        ("qwen3_moe",),
        fields=EXPERTS,
        known=YARN_FIELDS,
        read=lambda fields, config: {
            "rope_scaling": read_yarn(fields),
            "normalize_weights": True,
            "dense_layers": [],
        },
        write=write_experts,
    )
}


def dense_layers(theirs):
    """The layers without experts: those that mlp_only_layers names, and all but every so many-th."""
    named = theirs["mlp_only_layers"] or []
    if not all(type(n) is int and 0 <= n < theirs["num_hidden_layers"] for n in named):
        raise UserError(f"config.json: mlp_only_layers is {named!r}, where numbers of layers were expected")
    step = theirs["decoder_sparse_step"]
    return [n for n in range(theirs["num_hidden_layers"]) if n in named or (n + 1) % step]


def num_experts(theirs):
    """Published files call it num_experts, those that transformers 5 writes num_local_experts."""
    return theirs["num_local_experts"] or theirs["num_experts"]


def num_active_experts(theirs):
    active, experts = theirs["num_experts_per_tok"], num_experts(theirs)
    if active > experts:
        raise UserError(f"config.json: num_experts_per_tok is {active}, where there are {experts} experts")
    return active


QWEN3_MOE_TYPE = HFType(
    model="qwen3_moe",
    used={
        **QWEN3_TYPE.used,
        "d_expert": "moe_intermediate_size",
        "num_experts": num_experts,
        "num_active_experts": num_active_experts,
        "normalize_weights": "norm_topk_prob",
        "dense_layers": dense_layers,
    },
    defaults={
        **QWEN3_TYPE.defaults,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 24,
        "num_key_value_heads": 4,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_local_experts": None,
        "num_experts_per_tok": 8,
        "norm_topk_prob": False,
        "mlp_only_layers": [],
        "decoder_sparse_step": 1,
    },
    must_equal=QWEN3_TYPE.must_equal,
    # The router's logits are asked for and its loss is computed in training alone.
    inert=QWEN3_TYPE.inert | {"output_router_logits", "router_aux_loss_coef"},
)

HF_TYPES = {"qwen3_moe": QWEN3_MOE_TYPE}


def to_hf_config(config):
    return {
        **qwen3.to_hf_config(config),
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        **renamed(QWEN3_MOE_TYPE, config),
        "num_experts": config["num_experts"],
        "num_experts_per_tok": config["num_active_experts"],
        "mlp_only_layers": list(config["dense_layers"]),
        "decoder_sparse_step": 1,
    }
