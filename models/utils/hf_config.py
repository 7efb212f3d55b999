"""How Hugging Face describes a model: config.json of each model_type, read into our config and written again.

A model_type knows three lists of fields: those that are used, with what `transformers` takes where a file is
silent; those that must have one value, because our model does nothing else; those that are inert, without
influence on the logits of a trained model. Any other field stops the conversion: it may mean anything.

To add a model: read its configuration_*.py and modeling_*.py in `transformers`, give every field its place.
tests/test_convert_hf_checkpoint.py holds the defaults equal to those of `transformers`.
"""

from dataclasses import dataclass, field

from models.utils.errors import UserError


@dataclass(frozen=True)
class HFType:
    """How a config.json of one model_type is read, and which file of models/ implements it."""

    model: str
    used: dict  # our field -> their field, or a function of their fields
    defaults: dict  # every field that is used -> what transformers takes where config.json is silent
    must_equal: dict  # their field -> the values that our model implements, the one for silence first
    inert: set
    silence: dict = field(default_factory=dict)  # what silence means where that is not implemented
    fixed: dict = field(default_factory=dict)  # our field -> value: their code leaves no choice
    token_ids: dict = field(default_factory=dict)  # special tokens where config.json is silent


# Fields with a null of their own: computed from others, or nothing.
MAY_BE_NULL = {"n_inner", "num_key_value_heads", "head_dim", "rope_scaling", "rope_parameters"}


def words(text):
    return set(text.split())


# How the file came about, how to train further, how to generate (generation_config.json is the place for that
# today), and what belongs to heads for other tasks.
INERT = words("""
    architectures auto_map dtype torch_dtype transformers_version _name_or_path name_or_path _commit_hash
    attn_implementation _attn_implementation _attn_implementation_autoset torchscript use_bfloat16
    tf_legacy_loss transformers.js_config unsloth_fixed unsloth_version initializer_range
    gradient_checkpointing
    bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id tokenizer_class prefix
    task_specific_params finetuning_task problem_type id2label label2id num_labels _num_labels
    use_cache output_attentions output_hidden_states output_scores output_past return_dict
    return_dict_in_generate is_decoder tie_encoder_decoder cross_attention_hidden_size chunk_size_feed_forward
    do_sample temperature top_k top_p typical_p epsilon_cutoff eta_cutoff max_length min_length max_new_tokens
    early_stopping num_beams num_beam_groups num_return_sequences diversity_penalty length_penalty
    repetition_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size encoder_repetition_penalty
    bad_words_ids suppress_tokens begin_suppress_tokens forced_bos_token_id forced_eos_token_id
    exponential_decay_length_penalty remove_invalid_values
""")

DECODER = {"is_encoder_decoder": (False,), "pruned_heads": ({},)}

# Fields of ours that take more than a new name; `theirs` holds every field that is used, silent or not.


def gpt2_d_ff(theirs):
    return theirs["n_inner"] or 4 * theirs["n_embd"]


def gpt2_dropout(theirs):
    """Three rates in theirs, one in ours: every published GPT-2 has three times 0.1."""
    rates = {name: theirs[name] for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop")}
    if len(set(rates.values())) > 1:
        raise UserError(f"config.json: models/gpt2.py has one dropout rate for all three of {rates}")
    return rates["resid_pdrop"]


def head_dim(theirs):
    return theirs["head_dim"] or theirs["hidden_size"] // theirs["num_attention_heads"]


def num_kv_heads(theirs):
    return theirs["num_key_value_heads"] or theirs["num_attention_heads"]


def rope_base(theirs):
    return rope_parameters(theirs)["rope_theta"]


def rope_scaling(theirs):
    """Llama 3.1's scaling is the one that models/llama.py implements."""
    parameters = rope_parameters(theirs)
    where = f"config.json: {'rope_scaling' if theirs['rope_scaling'] else 'rope_parameters'}"
    kind = parameters.pop("rope_type")
    if kind not in ("default", "llama3"):
        raise UserError(f"{where} has rope_type {kind!r}; models/llama.py implements default and llama3")
    names = list(ROPE_SCALING.values()) if kind == "llama3" else []
    strange = set(parameters).symmetric_difference({"rope_theta", *names})
    if strange:
        wanted = ", ".join(names) or "nothing more"
        raise UserError(f"{where} of rope_type {kind} has {wanted}; amiss here: {', '.join(sorted(strange))}")
    return {ours: parameters[name] for ours, name in ROPE_SCALING.items()} if names else None


ROPE_SCALING = {
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_max_seq_len": "original_max_position_embeddings",
}


def rope_parameters(theirs):
    """RoPE's fields: in the old form rope_theta and rope_scaling, in the new one all inside rope_parameters.

    Where they compete, the same wins as in transformers: rope_scaling, and a rope_theta inside it.
    """
    inner = theirs["rope_scaling"] or theirs["rope_parameters"] or {}
    parameters = {"rope_theta": theirs["rope_theta"], "rope_type": inner.get("type", "default"), **inner}
    parameters.pop("type", None)
    if parameters["rope_type"] == "llama3":
        parameters.setdefault("original_max_position_embeddings", theirs["max_position_embeddings"])
    if parameters.get("partial_rotary_factor") in (None, 1):
        parameters.pop("partial_rotary_factor", None)
    return parameters


GPT2_TYPE = HFType(
    model="gpt2",
    used={
        "vocab_size": "vocab_size",
        "max_seq_len": "n_positions",
        "d_model": "n_embd",
        "num_layers": "n_layer",
        "num_heads": "n_head",
        "d_ff": gpt2_d_ff,
        "norm_eps": "layer_norm_epsilon",
        "dropout": gpt2_dropout,
    },
    defaults={
        "vocab_size": 50257,
        "n_positions": 1024,
        "n_embd": 768,
        "n_layer": 12,
        "n_head": 12,
        "n_inner": None,
        "layer_norm_epsilon": 1e-5,
        "resid_pdrop": 0.1,
        "embd_pdrop": 0.1,
        "attn_pdrop": 0.1,
    },
    must_equal={
        **DECODER,
        "activation_function": ("gelu_new",),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "reorder_and_upcast_attn": (False,),
        "add_cross_attention": (False,),
        "tie_word_embeddings": (True,),
    },
    # n_ctx gave the size of the mask that n_positions gives now; the others belong to heads for other tasks.
    inert=words("""
        n_ctx n_special predict_special_tokens summary_type summary_use_proj summary_activation
        summary_proj_to_labels summary_first_dropout
    """),
    token_ids={"bos_token_id": 50256, "eos_token_id": 50256},
)

LLAMA_TYPE = HFType(
    model="llama",
    used={
        "vocab_size": "vocab_size",
        "max_seq_len": "max_position_embeddings",
        "d_model": "hidden_size",
        "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "num_kv_heads": num_kv_heads,
        "head_dim": head_dim,
        "d_ff": "intermediate_size",
        "norm_eps": "rms_norm_eps",
        "rope_base": rope_base,
        "rope_scaling": rope_scaling,
        "qkv_bias": "attention_bias",
        "o_bias": "attention_bias",
        "ffn_bias": "mlp_bias",
        "tied_head": "tie_word_embeddings",
    },
    defaults={
        "vocab_size": 32000,
        "max_position_embeddings": 2048,
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": None,
        "head_dim": None,
        "intermediate_size": 11008,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "rope_scaling": {},
        "rope_parameters": {},
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
    },
    must_equal={**DECODER, "hidden_act": ("silu",), "pretraining_tp": (1,), "rope_interleaved": (False,)},
    # attention_dropout acts in training alone, and models/llama.py has no dropout.
    inert=words("attention_dropout is_llama_config"),
    token_ids={"bos_token_id": 1, "eos_token_id": 2},
)


def without(fields, *names):
    return {name: value for name, value in fields.items() if name not in names}


MISTRAL_TYPE = HFType(
    model="llama",
    used=without(LLAMA_TYPE.used, "qkv_bias", "o_bias", "ffn_bias"),
    defaults={
        **without(LLAMA_TYPE.defaults, "attention_bias", "mlp_bias"),
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
    },
    must_equal={**DECODER, "hidden_act": ("silu",), "sliding_window": (None,)},
    # Without the field, the window is 4096 positions wide; Mistral 7B says null from version 0.2 on.
    silence={"sliding_window": 4096},
    inert={"attention_dropout"},
    fixed={"qkv_bias": False, "o_bias": False, "ffn_bias": False},
    token_ids={"bos_token_id": 1, "eos_token_id": 2},
)

QWEN2_TYPE = HFType(
    model="llama",
    used=MISTRAL_TYPE.used,
    defaults={
        **without(LLAMA_TYPE.defaults, "attention_bias", "mlp_bias"),
        "vocab_size": 151936,
        "max_position_embeddings": 32768,
        "num_key_value_heads": 32,
        "intermediate_size": 22016,
    },
    must_equal={
        **DECODER,
        "hidden_act": ("silu",),
        "use_sliding_window": (False,),
        "layer_types": ("full_attention", None),
        "use_mrope": (False,),
    },
    # The two about windows are read where use_sliding_window is true, and nowhere else.
    inert=words("attention_dropout sliding_window max_window_layers"),
    fixed={"qkv_bias": True, "o_bias": False, "ffn_bias": False},
)

HF_TYPES = {"gpt2": GPT2_TYPE, "llama": LLAMA_TYPE, "mistral": MISTRAL_TYPE, "qwen2": QWEN2_TYPE}


# Configs, both ways -----------------------------------------------------------------------------------------


def from_hf_config(hf_config, allow=()):
    """(our model's name, our flat config) from a config.json of Hugging Face.

    allow: fields that no list knows and that the caller takes to be harmless.
    """
    model_type = hf_config.get("model_type")
    if not isinstance(model_type, str) or model_type not in HF_TYPES:
        raise UserError(f"config.json: model_type is {model_type!r}; supported: {', '.join(HF_TYPES)}")
    hf_type = HF_TYPES[model_type]
    refuse_fields(hf_type, hf_config, allow)

    theirs = {
        name: checked(name, hf_config.get(name, default), default)
        for name, default in hf_type.defaults.items()
    }
    config = {"model": hf_type.model}
    for ours, source in hf_type.used.items():
        config[ours] = source(theirs) if callable(source) else theirs[source]
    return hf_type.model, {**config, **hf_type.fixed}


def refuse_fields(hf_type, hf_config, allow):
    """Stop at values that our model does not implement, and at fields that nobody here has heard of."""
    page = f"models/{hf_type.model}.py"
    problems = []
    for name, values in hf_type.must_equal.items():
        value = hf_config.get(name, hf_type.silence.get(name, values[0]))
        if not any(same(value, implemented) for implemented in values):
            silent = (
                "" if name in hf_config else " (as transformers takes it where config.json has no such field)"
            )
            problems.append(
                f"{name} is {value!r}{silent}; {page} implements {' or '.join(map(repr, values))}"
            )

    known = {"model_type", *hf_type.defaults, *hf_type.must_equal, *INERT, *hf_type.inert}
    strange = [name for name in hf_config if name not in known and name not in allow]
    if strange:
        options = " ".join(f"--allow {name}" for name in strange)
        problems.append(
            f"{page} does not know {', '.join(strange)}; if the logits do not depend on it: {options}"
        )
    problems += [f"--allow {name}: there is no such field" for name in allow if name not in hf_config]
    if problems:
        raise UserError("config.json: " + "; ".join(problems))


def same(value, implemented):
    """Equal, where 1, 1.0 and True differ, and where a list is what all its entries are."""
    if isinstance(value, list) and value:
        return all(same(entry, implemented) for entry in value)
    return type(value) is type(implemented) and value == implemented


def checked(name, value, default):
    """A value of config.json, of the type that its default has; sizes are positive, and some may be null."""
    if value is None and name in MAY_BE_NULL:
        return None
    kind = int if default is None else type(default)
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind or (kind is int and value < 1):
        spoken = {int: "a positive integer", float: "a number", bool: "true or false", dict: "an object"}
        raise UserError(f"config.json: {name} is {value!r}, where {spoken[kind]} was expected")
    return value


def generation_ids(hf_config):
    """The special tokens that config.json, or transformers where it is silent, names for generation."""
    ids = HF_TYPES[hf_config["model_type"]].token_ids | hf_config
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {name: ids[name] for name in names if ids.get(name) is not None}


def to_hf_config(model_name, config):
    """Our flat config as a config.json for transformers, in the form that old versions read as well."""
    writers = {"gpt2": gpt2_config, "llama": llama_config}
    return writers[model_name](config)


def renamed(hf_type, config):
    """The fields that only change their name."""
    return {theirs: config[ours] for ours, theirs in hf_type.used.items() if isinstance(theirs, str)}


def gpt2_config(config):
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        **renamed(GPT2_TYPE, config),
        "n_inner": config["d_ff"],
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), config["dropout"]),
        "activation_function": "gelu_new",
        "tie_word_embeddings": True,
    }


def llama_config(config):
    """Biases decide the model_type: Qwen2 has them on q, k and v, Llama on all four projections or none."""
    biases = {name: config[name] for name in ("qkv_bias", "o_bias", "ffn_bias")}
    if biases == QWEN2_TYPE.fixed:
        kind, hf_type = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}, QWEN2_TYPE
    elif biases["qkv_bias"] == biases["o_bias"]:
        kind, hf_type = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}, LLAMA_TYPE
    else:
        raise UserError(f"no model_type of Hugging Face has the biases {biases}")
    scaling = config["rope_scaling"]
    if scaling:
        scaling = {"rope_type": "llama3", **{theirs: scaling[ours] for ours, theirs in ROPE_SCALING.items()}}
    return {
        **kind,
        **renamed(hf_type, config),
        "num_key_value_heads": config["num_kv_heads"],
        "head_dim": config["head_dim"],
        "hidden_act": "silu",
        "rope_theta": config["rope_base"],
        "rope_scaling": scaling,
    }
