"""gpt-oss at Hugging Face: Llama's names, and the experts of a layer in one tensor.

The published checkpoints hold the experts' matrices in MXFP4: blocks of 4-bit codes and their scales. They
come over as they are, code for code (models/utils/quantize.py).
"""

import math

from conversion.config_fields import DECODER, HFType, renamed, spellings, words
from conversion.gguf_table import EXPERTS, YARN_FIELDS, GGUFType, read_yarn, write_yarn
from conversion.tables.llama import PARALLEL as LLAMA_PARALLEL
from conversion.tables.llama import rope_base, rope_parameters
from conversion.tables.qwen3 import OPTIONAL, YARN, natural_scale
from conversion.tensor_table import Layout, Row, table
from models.utils.errors import UserError

PLAIN = table("""
    token_embed.weight                   model.embed_tokens.weight
    layers.{n}.attn_norm.weight          model.layers.{n}.input_layernorm.weight
    layers.{n}.attn.q_proj.{p}           model.layers.{n}.self_attn.q_proj.{p}
    layers.{n}.attn.k_proj.{p}           model.layers.{n}.self_attn.k_proj.{p}
    layers.{n}.attn.v_proj.{p}           model.layers.{n}.self_attn.v_proj.{p}
    layers.{n}.attn.o_proj.{p}           model.layers.{n}.self_attn.o_proj.{p}
    layers.{n}.attn.sinks                model.layers.{n}.self_attn.sinks
    layers.{n}.ffn_norm.weight           model.layers.{n}.post_attention_layernorm.weight
    layers.{n}.ffn.router.{p}            model.layers.{n}.mlp.router.{p}
    final_norm.weight                    model.norm.weight
    lm_head.weight                       lm_head.weight
""")


def experts(text):
    """A table of the experts' tensors, the beginnings of whose names are left out."""
    ours, theirs = "layers.{n}.ffn.experts.{e}.", "model.layers.{n}.mlp.experts."
    return [Row(ours + row.ours, theirs + row.theirs, row.transform) for row in table(text)]


BIASES = experts("""
    {gate,up}_proj.bias      gate_up_proj_bias       gate_and_up
    down_proj.bias           down_proj_bias          per_expert
""")
WEIGHTS = experts("""
    {gate,up}_proj.weight    gate_up_proj            gate_and_up+transpose
    down_proj.weight         down_proj               per_expert+transpose
""")
CODES = experts("""
    {gate,up}_proj.weight    gate_up_proj_blocks     gate_and_up+blocks
    {gate,up}_proj.scale     gate_up_proj_scales     gate_and_up+scales
    down_proj.weight         down_proj_blocks        per_expert+blocks
    down_proj.scale          down_proj_scales        per_expert+scales
""")
LAYOUT = Layout(
    prefix="model.",
    rows=PLAIN + BIASES + WEIGHTS,
    in_codes={"mxfp4": CODES},
)

SWIGLU = {"swiglu_alpha": 1.702, "swiglu_limit": 7.0}  # which llama.cpp has in its code, and files do not


def read_gguf(fields, config):
    scaling = read_yarn(fields)
    if scaling is None:
        raise ValueError("has no YaRN, without which there is no gpt-oss")
    return {"rope_scaling": scaling, **SWIGLU}


def write_gguf(config):
    """llama.cpp rounds the ends of YaRN's line to whole pairs, which the published gpt-oss does not."""
    for name, value in SWIGLU.items():
        if config[name] != value:
            raise UserError(f"{name} is {config[name]}, where llama.cpp has {value}; not written as GGUF")
    return {"feed_forward_length": config["d_expert"], **write_yarn(config["rope_scaling"])}


GGUF = {
    "gpt-oss": GGUFType(
        ("gpt_oss",),
        fields={**EXPERTS, "window": "attention.sliding_window"},
        rows=table("""
            layers.{n}.attn.sinks                         blk.{n}.attn_sinks.weight
            layers.{n}.ffn.experts.{e}.gate_proj.weight   blk.{n}.ffn_gate_exps.weight   per_expert
            layers.{n}.ffn.experts.{e}.up_proj.weight     blk.{n}.ffn_up_exps.weight     per_expert
            layers.{n}.ffn.experts.{e}.down_proj.weight   blk.{n}.ffn_down_exps.weight   per_expert
            layers.{n}.ffn.experts.{e}.gate_proj.bias     blk.{n}.ffn_gate_exps.bias     per_expert
            layers.{n}.ffn.experts.{e}.up_proj.bias       blk.{n}.ffn_up_exps.bias       per_expert
            layers.{n}.ffn.experts.{e}.down_proj.bias     blk.{n}.ffn_down_exps.bias     per_expert
        """),
        codes=table("""
            layers.{n}.ffn.experts.{e}.gate_proj.weight   blk.{n}.ffn_gate_exps.weight   per_expert
            layers.{n}.ffn.experts.{e}.gate_proj.scale    blk.{n}.ffn_gate_exps.scale    per_expert+scales
            layers.{n}.ffn.experts.{e}.up_proj.weight     blk.{n}.ffn_up_exps.weight     per_expert
            layers.{n}.ffn.experts.{e}.up_proj.scale      blk.{n}.ffn_up_exps.scale      per_expert+scales
            layers.{n}.ffn.experts.{e}.down_proj.weight   blk.{n}.ffn_down_exps.weight   per_expert
            layers.{n}.ffn.experts.{e}.down_proj.scale    blk.{n}.ffn_down_exps.scale    per_expert+scales
        """),
        known=YARN_FIELDS | {"feed_forward_length"},
        read=read_gguf,
        write=write_gguf,
    )
}

# Each head has a sink, attn.sinks, which goes with it.
PARALLEL = LLAMA_PARALLEL | {"ffn": "experts"}

# What the published config.json says of the codes; another choice of modules is refused.
MXFP4 = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
}

# YaRN's fields where config.json has neither rope_parameters nor rope_scaling.
YARN_OF_SILENCE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def yarn(theirs):
    """YaRN's fields, and where config.json has them."""
    parameters = rope_parameters(theirs)
    if not theirs["rope_scaling"] and not theirs["rope_parameters"]:
        parameters |= YARN_OF_SILENCE
    where = f"config.json: {'rope_scaling' if theirs['rope_scaling'] else 'rope_parameters'}"
    return where, {name: value for name, value in parameters.items() if value is not None}


def rope_scaling(theirs):
    """YaRN whose line is not rounded to whole pairs: what models/gpt_oss.py implements."""
    where, given = yarn(theirs)
    kind = given.pop("rope_type")
    if kind != "yarn":
        raise UserError(f"{where} has rope_type {kind!r}; models/gpt_oss.py implements yarn")
    if missing := [name for name in YARN if name not in given]:
        raise UserError(f"{where} of rope_type yarn lacks {', '.join(missing)}")
    numbers = {**YARN, **OPTIONAL}
    if unknown := sorted(set(given) - {*numbers, "rope_theta", "truncate"}):
        raise UserError(f"{where} of rope_type yarn: models/gpt_oss.py does not know {', '.join(unknown)}")
    for name in numbers:
        if type(given.get(name, 1)) not in (int, float):
            raise UserError(f"{where}: {name} is {given[name]!r}, where a number is expected")
    if (truncate := given.get("truncate", True)) is not False:
        silent = "" if "truncate" in given else ", as transformers takes it where there is no such field"
        raise UserError(f"{where}: truncate is {truncate!r}{silent}; models/gpt_oss.py implements false")
    silence = {"beta_fast": 32.0, "beta_slow": 1.0, "attention_factor": natural_scale(given["factor"])}
    values = silence | given
    # Elsewhere transformers moves an end of the line to a pair that is there.
    most = values["original_max_position_embeddings"] / (2 * math.pi)
    if not most / values["rope_theta"] < values["beta_slow"] < values["beta_fast"] < most:
        raise UserError(
            f"{where}: beta_slow and beta_fast are {values['beta_slow']} and {values['beta_fast']}; "
            f"models/gpt_oss.py implements from {most / values['rope_theta']:.2g} up to {most:.4g} turns"
        )
    return {ours: values[name] for name, ours in numbers.items()}


def window(theirs):
    """The width of the windows, which the even layers have, from the first one on."""
    kinds = theirs["layer_types"]
    alternating = [("sliding_attention", "full_attention")[n % 2] for n in range(theirs["num_hidden_layers"])]
    if kinds and kinds != alternating:
        raise UserError(
            f"config.json: layer_types is {kinds!r}; models/gpt_oss.py implements sliding_attention and "
            "full_attention by turns, one for each of num_hidden_layers"
        )
    return theirs["sliding_window"]


def num_active_experts(theirs):
    if theirs["num_experts_per_tok"] > theirs["num_local_experts"]:
        raise UserError(
            f"config.json: num_experts_per_tok is {theirs['num_experts_per_tok']}, where there are "
            f"{theirs['num_local_experts']} experts"
        )
    return theirs["num_experts_per_tok"]


GPT_OSS_TYPE = HFType(
    model="gpt_oss",
    used={
        "vocab_size": "vocab_size",
        "max_seq_len": "max_position_embeddings",
        "d_model": "hidden_size",
        "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "num_kv_heads": "num_key_value_heads",
        "head_dim": "head_dim",
        "window": window,
        "d_expert": "intermediate_size",
        "num_experts": "num_local_experts",
        "num_active_experts": num_active_experts,
        "swiglu_alpha": "swiglu_alpha",
        "swiglu_limit": "swiglu_limit",
        "norm_eps": "rms_norm_eps",
        "rope_base": rope_base,
        "rope_scaling": rope_scaling,
    },
    defaults={
        "vocab_size": 201088,
        "max_position_embeddings": 131072,
        "hidden_size": 2880,
        "num_hidden_layers": 36,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "sliding_window": 128,
        "layer_types": [],
        "intermediate_size": 2880,
        "num_local_experts": 128,
        "num_experts_per_tok": 4,
        "swiglu_alpha": 1.702,
        "swiglu_limit": 7.0,
        "rms_norm_eps": 1e-5,
        "rope_theta": 150000.0,
        "rope_scaling": {},
        "rope_parameters": {},
    },
    must_equal={
        **DECODER,
        "hidden_act": spellings("silu"),
        "attention_bias": (True,),
        "tie_word_embeddings": (False,),
    },
    # The router's logits are asked for and its loss is computed in training alone.
    inert=words("attention_dropout output_router_logits router_aux_loss_coef"),
    # The names of OpenAI's own code, which the published files have too and transformers does not read.
    repeated={
        "experts_per_token": lambda theirs: theirs["num_experts_per_tok"],
        "initial_context_length": lambda theirs: yarn(theirs)[1].get("original_max_position_embeddings"),
    },
    quantization=MXFP4,
)

HF_TYPES = {"gpt_oss": GPT_OSS_TYPE}


def to_hf_config(config):
    scaling = config["rope_scaling"]
    return {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        **renamed(GPT_OSS_TYPE, config),
        "sliding_window": config["window"],
        "layer_types": [("sliding_attention", "full_attention")[n % 2] for n in range(config["num_layers"])],
        "num_experts_per_tok": config["num_active_experts"],
        "hidden_act": "silu",
        "rope_theta": config["rope_base"],
        "rope_scaling": {
            "rope_type": "yarn",
            "truncate": False,
            **{name: scaling[ours] for name, ours in (YARN | OPTIONAL).items()},
        },
    }
