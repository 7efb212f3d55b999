"""models/transformer_lm.py at Hugging Face: a Llama with as many key/value heads as heads, and no biases.

Llama's checkpoints are models/llama.py's, unless `convert_hf_checkpoint.py --model transformer_lm` asks for
this page. A model without RoPE is a SmolLM3, the model_type that says of each layer whether it has RoPE.
"""

from conversion.config_fields import HFType, renamed, same
from conversion.tables.llama import LAYOUT, LLAMA_TYPE, PARALLEL, head_dim, rope_parameters, without
from models.utils.errors import UserError

__all__ = ["HF_TYPES", "LAYOUT", "PARALLEL", "to_hf_config"]


def num_heads(theirs):
    heads, kv_heads = theirs["num_attention_heads"], theirs["num_key_value_heads"]
    if kv_heads not in (None, heads):
        raise UserError(
            f"config.json: num_key_value_heads is {kv_heads} and num_attention_heads is {heads}; "
            "in models/transformer_lm.py they are equal, in models/llama.py they need not be"
        )
    return heads


def rope_base(theirs):
    where = "rope_scaling" if theirs["rope_scaling"] else "rope_parameters"
    parameters = rope_parameters(theirs)
    base, kind = parameters.pop("rope_theta"), parameters.pop("rope_type")
    if kind != "default" or parameters:
        more = "".join(f", {name}" for name in parameters)
        raise UserError(
            f"config.json: {where} has rope_type {kind!r}{more}; models/transformer_lm.py implements default"
        )
    return base


LLAMA = HFType(
    model="transformer_lm",
    used={
        **without(LLAMA_TYPE.used, "num_kv_heads", "qkv_bias", "o_bias", "ffn_bias", "rope_scaling"),
        "num_heads": num_heads,
        "head_dim": head_dim,
        "rope_base": rope_base,
    },
    defaults=without(LLAMA_TYPE.defaults, "attention_bias", "mlp_bias"),
    must_equal={**LLAMA_TYPE.must_equal, "attention_bias": (False,), "mlp_bias": (False,)},
    inert=LLAMA_TYPE.inert,
    token_ids=LLAMA_TYPE.token_ids,
    by_name_only=True,
)

SMOLLM3 = HFType(
    model="transformer_lm",
    used=LLAMA.used,
    defaults={
        **LLAMA.defaults,
        "vocab_size": 128256,
        "max_position_embeddings": 32768,
        "hidden_size": 2048,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "rope_theta": 2_000_000.0,
        "tie_word_embeddings": True,
    },
    # A list with an entry per layer: all of them 0, no RoPE, or all of them 1.
    must_equal={
        **without(LLAMA.must_equal, "pretraining_tp", "rope_interleaved"),
        "no_rope_layers": (0, 1),
        "use_sliding_window": (False,),
        "layer_types": ("full_attention", None),
    },
    # Without the list, or with null, every fourth layer has no RoPE.
    silence={"no_rope_layers": None},
    from_names=lambda hf_config, names: {"rope_base": None} if same(hf_config["no_rope_layers"], 0) else {},
    # Read where use_sliding_window is true, or no_rope_layers null, and nowhere else.
    inert={"attention_dropout", "sliding_window", "max_window_layers", "no_rope_layer_interval"},
    token_ids={"bos_token_id": 128000, "eos_token_id": 128001, "pad_token_id": 128004},
)

HF_TYPES = {"llama": LLAMA, "smollm3": SMOLLM3}


def to_hf_config(config):
    fields = {
        **renamed(LLAMA, config),
        "num_attention_heads": config["num_heads"],
        "num_key_value_heads": config["num_heads"],
        "head_dim": config["head_dim"],
        "hidden_act": "silu",
    }
    if config["rope_base"] is not None:
        kind = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
        return {**kind, **fields, "rope_theta": config["rope_base"]}
    kind = {"architectures": ["SmolLM3ForCausalLM"], "model_type": "smollm3"}
    # Without the null, transformers takes a pad token that a small vocabulary does not have.
    return {**kind, **fields, "no_rope_layers": [0] * config["num_layers"], "pad_token_id": None}
