"""Qwen3 at Hugging Face: Llama's names, and two norms."""

from conversion.config_fields import DECODER, HFType, renamed, spellings, words
from conversion.gguf_table import YARN_FIELDS, GGUFType, natural_scale, read_yarn, write_yarn
from conversion.tables.llama import LAYOUT as LLAMA_LAYOUT
from conversion.tables.llama import LLAMA_TYPE, rope_parameters
from conversion.tables.llama import PARALLEL as LLAMA_PARALLEL
from conversion.tensor_table import Layout, table
from models.utils.errors import UserError

LAYOUT = Layout(
    prefix="model.",
    tied=LLAMA_LAYOUT.tied,
    rows=LLAMA_LAYOUT.rows
    + table("""
        layers.{n}.attn.q_norm.weight        model.layers.{n}.self_attn.q_norm.weight
        layers.{n}.attn.k_norm.weight        model.layers.{n}.self_attn.k_norm.weight
    """),
)

GGUF = {
    "qwen3": GGUFType(
        ("qwen3",),
        known=YARN_FIELDS,
        read=lambda fields, config: {"rope_scaling": read_yarn(fields)},
        write=lambda config: write_yarn(config["rope_scaling"]),
    )
}

# The norms of q and k are one for all heads, and stay whole.
PARALLEL = LLAMA_PARALLEL


# YaRN's fields -> ours; what transformers takes where an optional one is missing or null.
YARN = {"factor": "factor", "original_max_position_embeddings": "original_max_seq_len"}
OPTIONAL = {"beta_fast": "fast_turns", "beta_slow": "slow_turns", "attention_factor": "rotation_scale"}
YARN_DEFAULTS = {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": True}


def rope_scaling(theirs):
    """YaRN, or nothing: what models/qwen3.py implements."""
    parameters = rope_parameters(theirs)
    where = f"config.json: {'rope_scaling' if theirs['rope_scaling'] else 'rope_parameters'}"
    kind = parameters.pop("rope_type")
    if kind not in ("default", "yarn"):
        raise UserError(f"{where} has rope_type {kind!r}; models/qwen3.py implements default and yarn")
    needed = {"rope_theta"} | (set(YARN) if kind == "yarn" else set())
    optional = {*OPTIONAL, *YARN_DEFAULTS} if kind == "yarn" else set()
    if missing := sorted(name for name in needed if parameters.get(name) is None):
        raise UserError(f"{where} of rope_type {kind} lacks {', '.join(missing)}")
    if unknown := sorted(set(parameters) - needed - optional):
        raise UserError(f"{where} of rope_type {kind}: models/qwen3.py does not know {', '.join(unknown)}")
    if kind == "default":
        return None
    given = {name: value for name, value in parameters.items() if value is not None}
    for name in (*YARN, *OPTIONAL):
        if type(given.get(name, 1)) not in (int, float):
            raise UserError(f"{where}: {name} is {given[name]!r}, where a number is expected")
    values = {"attention_factor": natural_scale(given["factor"]), **YARN_DEFAULTS, **given}
    if values["truncate"] is not True:
        raise UserError(f"{where}: truncate is {values['truncate']!r}; models/qwen3.py implements true")
    return {ours: values[name] for name, ours in (YARN | OPTIONAL).items()}


QWEN3_TYPE = HFType(
    model="qwen3",
    used={
        **{ours: LLAMA_TYPE.used[ours] for ours in LLAMA_TYPE.used if not ours.endswith("_bias")},
        "head_dim": "head_dim",
        "rope_scaling": rope_scaling,
    },
    # What transformers takes where config.json is silent; no published Qwen3 is.
    defaults={
        **{name: LLAMA_TYPE.defaults[name] for name in LLAMA_TYPE.defaults if not name.endswith("_bias")},
        "vocab_size": 151936,
        "max_position_embeddings": 32768,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "intermediate_size": 22016,
    },
    must_equal={
        **DECODER,
        "hidden_act": spellings("silu"),
        "attention_bias": (False,),
        "use_sliding_window": (False,),
        "layer_types": ("full_attention", None),
    },
    # The two about windows are read where use_sliding_window is true, and nowhere else.
    inert=words("attention_dropout sliding_window max_window_layers"),
)

HF_TYPES = {"qwen3": QWEN3_TYPE}


def to_hf_config(config):
    scaling = config["rope_scaling"]
    if scaling:
        scaling = {
            "rope_type": "yarn",
            **{name: scaling[ours] for name, ours in (YARN | OPTIONAL).items()},
        }
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        **renamed(QWEN3_TYPE, config),
        "num_key_value_heads": config["num_kv_heads"],
        "hidden_act": "silu",
        "rope_theta": config["rope_base"],
        "rope_scaling": scaling,
    }
