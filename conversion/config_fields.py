"""How Hugging Face describes a model: the fields of config.json, read into our config.

A model_type knows three lists of fields: those that are used, with what `transformers` takes where a file is
silent; those that must have one value, because our model does nothing else; those that are inert, without
influence on the logits of a trained model. Any other field stops the conversion: it may mean anything.

The lists of each model_type stand in the table of our model that implements it (tables/gpt2.py, ...). To
write them, read configuration_*.py and modeling_*.py in `transformers`, and give every field its place.
tests/test_convert_hf_checkpoint.py holds the defaults equal to those of `transformers`.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from models.utils.errors import UserError, printable
from models.utils.files import read_json


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
    # their field, which nobody reads -> a function of their fields: the value that it repeats
    repeated: dict = field(default_factory=dict)
    # the quantization_config of files whose codes the table reads, its lists in any order
    quantization: dict = field(default_factory=dict)
    # fields that old files have in config.json and new ones in generation_config.json, where we read them
    generation: tuple = ("bos_token_id", "eos_token_id", "pad_token_id")
    # (config.json, names of the file's tensors) -> the fields of ours that these two settle together
    from_names: Callable = lambda hf_config, names: {}
    # The field of config.json that describes our model, where the file describes a larger one.
    part: str = ""
    # Two tables may take a model_type if one of them is read only where --model asks for it.
    by_name_only: bool = False


# Fields with a null of their own: computed from others, or nothing.
MAY_BE_NULL = {
    "decoder_vocab_size",
    "head_dim",
    "layer_types",
    "mlp_only_layers",
    "n_group",
    "n_inner",
    "num_key_value_heads",
    "num_local_experts",
    "q_lora_rank",
    "rope_parameters",
    "rope_scaling",
    "topk_group",
}
MAY_BE_ZERO = {"first_k_dense_replace"}


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


# Reading a config.json --------------------------------------------------------------------------------------


def read_config(hf_type, hf_config, allow=()):
    """Our flat config. allow: fields that no list knows and that the caller takes to be harmless."""
    hf_config = with_part(hf_type, hf_config)
    refuse_fields(hf_type, hf_config, allow)
    theirs = {
        name: checked_value(name, hf_config.get(name, default), default)
        for name, default in hf_type.defaults.items()
    }
    for name, repeats in hf_type.repeated.items():
        if name in hf_config and hf_config[name] != repeats(theirs):
            raise UserError(
                f"config.json: {name} is {hf_config[name]!r}, where other fields say {repeats(theirs)!r}; "
                "correct the one that is wrong"
            )
    config = {"model": hf_type.model}
    for ours, source in hf_type.used.items():
        config[ours] = source(theirs) if callable(source) else theirs[source]
    return {**config, **hf_type.fixed}


def with_part(hf_type, hf_config):
    """The fields of the part that is our model, and those that stand around it."""
    part = hf_config.get(hf_type.part) or {}
    if not isinstance(part, dict):
        raise UserError(f"config.json: {hf_type.part} is {part!r}, where an object was expected")
    return {**part, **{name: value for name, value in hf_config.items() if name != hf_type.part}}


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

    stored = hf_config.get("quantization_config")
    if stored and not same_settings(stored, hf_type.quantization):
        problems.append(
            f"quantization_config is another than {json.dumps(hf_type.quantization)}, the one that is read"
            if hf_type.quantization
            else "quantization_config: quantized checkpoints are not read; take the repository that it was "
            "made from, and quantize that here with --quantize"
        )
    known = {
        "model_type",
        "quantization_config",
        *hf_type.defaults,
        *hf_type.must_equal,
        *INERT,
        *hf_type.inert,
        *hf_type.repeated,
    }
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


def same_settings(given, expected):
    """Equal objects of JSON, but for the order of a list's entries."""

    def in_order(settings):
        return {n: sorted(v, key=str) if isinstance(v, list) else v for n, v in settings.items()}

    return isinstance(given, dict) and in_order(given) == in_order(expected)


def checked_value(name, value, default):
    """A value of config.json, of the type that its default has; sizes are positive, and some may be null."""
    if value is None and name in MAY_BE_NULL:
        return None
    kind = int if default is None else type(default)
    if kind is float and type(value) is int and abs(value) < 2**63:
        return float(value)
    smallest = 0 if name.endswith("_id") or name in MAY_BE_ZERO else 1
    if type(value) is not kind or (kind is int and not smallest <= value < 2**31):
        spoken = {int: "a positive integer", float: "a number", bool: "true or false", dict: "an object"}
        spoken |= {str: "a word", list: "a list"}
        raise UserError(f"config.json: {name} is {value!r}, where {spoken[kind]} was expected")
    return value


# A function may have several names, which differ in the order of the same steps.
SPELLINGS = {
    "silu": ("silu", "swish"),
    "gelu": ("gelu", "gelu_python"),
    "gelu_new": ("gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_accurate"),
    "relu": ("relu",),
}


def spellings(activation):
    """The names that transformers has for one activation, for must_equal."""
    return SPELLINGS[activation]


def activation_named(theirs, field, page, implemented):
    """Which of our activations a field of theirs names."""
    for activation in implemented:
        if theirs[field] in SPELLINGS[activation]:
            return activation
    known = ", ".join(name for activation in implemented for name in SPELLINGS[activation])
    raise UserError(f"config.json: {field} is {theirs[field]!r}; {page} implements {known}")


def highest(*names):
    """Several dropout rates of theirs that are one of ours; no logits depend on it, only training does."""

    def read(theirs):
        for name in names:
            if not 0 <= theirs[name] < 1:
                raise UserError(
                    f"config.json: {name} is {theirs[name]!r}, where a number from 0 to below 1 was expected"
                )
        return max(theirs[name] for name in names)

    return read


def num_labels(hf_config):
    """Of a classifier; transformers takes two where config.json is silent."""
    named = hf_config.get("id2label")
    number = len(named) if isinstance(named, dict | list) and named else hf_config.get("_num_labels", 2)
    return checked_value("num_labels", hf_config.get("num_labels", number), 2)


def read_labels(hf_config, num_labels):
    """What labels.json holds: the names of the labels, in the logits' order, and the kind of problem."""
    named = hf_config.get("id2label") or {n: f"LABEL_{n}" for n in range(num_labels)}
    try:
        labels = [named[id] for id in sorted(named, key=int)]
        whole = [int(id) for id in sorted(named, key=int)] == list(range(num_labels))
    except (TypeError, ValueError, LookupError):
        whole = False
    if not whole or not all(isinstance(label, str) for label in labels):
        raise UserError(f"config.json: id2label does not name the labels 0 to {num_labels - 1}")
    problem_type = hf_config.get("problem_type")
    if problem_type not in PROBLEM_TYPES:
        raise UserError(f"config.json: problem_type is {problem_type!r}, where {PROBLEM_TYPES} are known")
    return {"labels": labels, "problem_type": problem_type}


PROBLEM_TYPES = (None, "regression", "single_label_classification", "multi_label_classification")


def stored_labels(folder):
    """What read_labels gave, from a converted checkpoint's labels.json; the names can be printed."""
    path = Path(folder) / "labels.json"
    content, num_labels = read_json(path), read_json(path.with_name("config.json")).get("num_labels")
    labels, problem_type = content.get("labels"), content.get("problem_type")
    whole = isinstance(labels, list) and all(isinstance(label, str) for label in labels)
    if not whole or len(labels) != num_labels or problem_type not in PROBLEM_TYPES:
        raise UserError(f"{path}: does not name {num_labels} labels; convert the checkpoint again")
    return {"labels": [printable(label, 200) for label in labels], "problem_type": problem_type}


# Writing one ------------------------------------------------------------------------------------------------


def label_fields(labels):
    """What stored_labels gives, as the fields of a config.json."""
    return {
        "id2label": {str(n): label for n, label in enumerate(labels["labels"])},
        "label2id": {label: n for n, label in enumerate(labels["labels"])},
        "problem_type": labels["problem_type"],
    }


def renamed(hf_type, config):
    """The fields that only change their name."""
    return {theirs: config[ours] for ours, theirs in hf_type.used.items() if isinstance(theirs, str)}
