"""Gemma 3 at Hugging Face: four norms a layer, two kinds of layers, and the text part of what also sees."""

from dataclasses import replace

from conversion.config_fields import DECODER, HFType, renamed, words
from conversion.gguf_table import GGUFType, plainly
from conversion.tables.qwen3 import LAYOUT as QWEN3_LAYOUT
from conversion.tables.qwen3 import PARALLEL as QWEN3_PARALLEL
from conversion.tensor_table import Layout, table
from models.utils.errors import UserError

# What reads images too has the text model as a part, under one of two names, and others beside it.
PARTS = {
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
    "model.language_model.": "model.",
}
OTHERS = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")

# Here post_attention_layernorm does stand behind attention, and the norm before the feed-forward has a name.
LAYOUT = Layout(
    prefix="model.",
    tied=lambda config: {"lm_head.weight": "token_embed.weight"},
    inside=PARTS,
    left_out=dict.fromkeys(OTHERS, "reads images, where models/gemma3.py reads text alone"),
    rows=[row for row in QWEN3_LAYOUT.rows if "ffn_norm" not in row.ours]
    + table("""
        layers.{n}.attn_out_norm.weight      model.layers.{n}.post_attention_layernorm.weight
        layers.{n}.ffn_norm.weight           model.layers.{n}.pre_feedforward_layernorm.weight
        layers.{n}.ffn_out_norm.weight       model.layers.{n}.post_feedforward_layernorm.weight
    """),
)

PARALLEL = QWEN3_PARALLEL


# llama.cpp writes down neither the scale of scores nor, in older files, what is the same in all of them.
LARGE = 62  # layers of the 27B, whose score_scale is D / H; that of the others is d


def read_gguf(fields, config):
    kind = fields.get("rope.scaling.type", "linear")
    if kind not in ("none", "linear"):
        raise ValueError(f"rope.scaling.type is {kind!r}, where none and linear are known")
    factor = fields.get("rope.scaling.factor", 1.0) if kind == "linear" else 1.0
    is_large = config["num_layers"] == LARGE
    return {
        "rope_base": plainly(fields.get("rope.freq_base", 1_000_000.0)),
        "rope_factor": plainly(factor) or 1.0,
        "local_rope_base": plainly(fields.get("rope.freq_base_swa", 10_000.0)),
        "full_every": fields.get("attention.sliding_window_pattern", 6),
        "score_scale": config["d_model"] // config["num_heads"] if is_large else config["head_dim"],
    }


def write_gguf(config):
    is_large = config["num_layers"] == LARGE
    wanted = config["d_model"] // config["num_heads"] if is_large else config["head_dim"]
    if config["score_scale"] != wanted:
        raise UserError(
            f"score_scale is {config['score_scale']}, where llama.cpp takes {wanted} in a gemma3 of "
            f"{config['num_layers']} layers; this model is not written as GGUF"
        )
    factor = config["rope_factor"]
    linear = {"rope.scaling.type": "linear", "rope.scaling.factor": factor} if factor != 1 else {}
    return {
        **linear,
        "rope.freq_base_swa": config["local_rope_base"],
        "attention.sliding_window_pattern": config["full_every"],
    }


# Norms multiply by 1 + weight here; llama.cpp stores the sum.
GGUF = {
    "gemma3": GGUFType(
        ("gemma3_text",),
        fields={"window": "attention.sliding_window"},
        transforms={"norm.weight": "less_one"},
        known=words("""
            rope.freq_base rope.freq_base_swa rope.scaling.type rope.scaling.factor
            attention.sliding_window_pattern
        """),
        read=read_gguf,
        write=write_gguf,
    )
}


def full_every(theirs):
    """Which layers have no window: layer_types says it, or where that is missing sliding_window_pattern."""
    num_layers, types = theirs["num_hidden_layers"], theirs["layer_types"]
    every = theirs["sliding_window_pattern"]
    if types:
        every = types.index("full_attention") + 1 if "full_attention" in types else num_layers + 1
        if types != layer_types(num_layers, every):
            raise UserError(
                f"config.json: layer_types is not {num_layers} layers of which every nth is full_attention, "
                "the others sliding_attention, which is what models/gemma3.py implements"
            )
    return min(every, num_layers + 1)


def layer_types(num_layers, every):
    return ["sliding_attention" if n % every else "full_attention" for n in range(1, num_layers + 1)]


def rope_base(theirs):
    return rope_parameters(theirs, "full_attention")["rope_theta"]


def rope_factor(theirs):
    return rope_parameters(theirs, "full_attention")["factor"]


def local_rope_base(theirs):
    return rope_parameters(theirs, "sliding_attention")["rope_theta"]


def rope_parameters(theirs, layer_type):
    """RoPE's fields for a kind of layer: all inside rope_parameters, or in old files each on its own.

    Where they compete, the same wins as in transformers: what is inside.
    """
    is_full = layer_type == "full_attention"
    inner = theirs["rope_parameters"] or {}
    if strange := sorted(set(inner) - {"full_attention", "sliding_attention"}):
        raise UserError(
            f"config.json: rope_parameters has {', '.join(strange)}, where full_attention and "
            "sliding_attention are expected, an object each"
        )
    where = f"config.json: rope_parameters of {layer_type}"
    given = inner.get(layer_type) or {}
    if is_full and theirs["rope_scaling"]:
        where, given = "config.json: rope_scaling", {**given, **theirs["rope_scaling"]}
    fields = {"rope_theta": theirs["rope_theta" if is_full else "rope_local_base_freq"], **given}
    kind = fields.pop("rope_type", fields.pop("type", "default"))
    fields.pop("type", None)
    kinds = ("default", "linear") if is_full else ("default",)
    if kind not in kinds:
        raise UserError(f"{where} has rope_type {kind!r}; models/gemma3.py implements {' and '.join(kinds)}")
    wanted = {"rope_theta"} | ({"factor"} if kind == "linear" else set())
    if strange := sorted(set(fields).symmetric_difference(wanted)):
        wanted = ", ".join(sorted(wanted))
        raise UserError(f"{where} of rope_type {kind} has {wanted}; amiss here: {', '.join(strange)}")
    return {"factor": 1.0, **fields}


TEXT_TYPE = HFType(
    model="gemma3",
    used={
        "vocab_size": "vocab_size",
        "max_seq_len": "max_position_embeddings",
        "d_model": "hidden_size",
        "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "num_kv_heads": "num_key_value_heads",
        "head_dim": "head_dim",
        "d_ff": "intermediate_size",
        "norm_eps": "rms_norm_eps",
        "window": "sliding_window",
        "full_every": full_every,
        "rope_base": rope_base,
        "rope_factor": rope_factor,
        "local_rope_base": local_rope_base,
        "score_scale": "query_pre_attn_scalar",
    },
    defaults={
        "vocab_size": 262208,
        "max_position_embeddings": 131072,
        "hidden_size": 2304,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "intermediate_size": 9216,
        "rms_norm_eps": 1e-6,
        "sliding_window": 4096,
        "sliding_window_pattern": 6,
        "layer_types": [],
        "rope_theta": 1_000_000.0,
        "rope_local_base_freq": 10_000.0,
        "rope_scaling": {},
        "rope_parameters": {},
        "query_pre_attn_scalar": 256,
    },
    must_equal={
        **DECODER,
        "hidden_activation": ("gelu_pytorch_tanh", "gelu_new", "gelu_fast", "gelu_accurate"),
        "attention_bias": (False,),
        "tie_word_embeddings": (True,),
        "final_logit_softcapping": (None,),
        # transformers reads it for Gemma 2 and not for Gemma 3, so that a number would mean one or the other.
        "attn_logit_softcapping": (None,),
        "use_bidirectional_attention": (False, None),
    },
    # _sliding_window_pattern is a copy that transformers saves and does not read.
    inert=words("attention_dropout cache_implementation _sliding_window_pattern"),
    token_ids={"bos_token_id": 2, "eos_token_id": 1},
)

# What sees has a config of its own for its text part, with the same hidden defaults.
SEEING_TYPE = replace(
    TEXT_TYPE,
    part="text_config",
    inert=TEXT_TYPE.inert
    | words("vision_config mm_tokens_per_image boi_token_index eoi_token_index image_token_index"),
    token_ids={},
)

HF_TYPES = {"gemma3_text": TEXT_TYPE, "gemma3": SEEING_TYPE}


def to_hf_config(config):
    factor = config["rope_factor"]
    return {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        **renamed(TEXT_TYPE, config),
        "hidden_activation": "gelu_pytorch_tanh",
        "layer_types": layer_types(config["num_layers"], config["full_every"]),
        "sliding_window_pattern": config["full_every"],
        "rope_theta": config["rope_base"],
        "rope_local_base_freq": config["local_rope_base"],
        "rope_scaling": None if factor == 1 else {"rope_type": "linear", "factor": factor},
        "tie_word_embeddings": True,
    }
