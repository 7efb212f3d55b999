"""Which model of ours a GGUF file holds: its fields as our config, its tensors' names beside ours.

What all architectures share stands in conversion/gguf_table.py (FIELDS), what is special in one in the
page's table, as GGUF; what a file has no field for is as transformers takes it where config.json is silent.
The names of tensors come in two steps: the tables of conversion/tables/ know Hugging Face's names of ours,
and the gguf package knows llama.cpp's names of those.
Proof: tests/test_gguf.py; tests/test_gguf_write.py.
"""

import json

import gguf

from conversion.gguf import GGUFFile, InCodes
from conversion.gguf_table import EXPERTS, FIELDS, MUST_EQUAL, plainly
from conversion.gguf_tokenizer import special_ids, tokenizer_files
from conversion.tables import LAYOUTS, PAGES, from_hf_config
from conversion.tensor_table import Layout
from models.utils.errors import UserError, printable
from models.utils.files import reading
from models.utils.quantize import Quantization

# Our field -> the tensor whose rows it counts.
COUNTED = {"vocab_size": "token_embd.weight", "num_segments": "token_types.weight"}
# Our field -> a tensor of the first layer that is there where it is true.
BIASES = {
    "qkv_bias": ("blk.0.attn_q.bias", "blk.0.attn_qkv.bias"),
    "attn_bias": ("blk.0.attn_qkv.bias",),
    "o_bias": ("blk.0.attn_output.bias",),
    "ffn_bias": ("blk.0.ffn_up.bias",),
}


def read_gguf(path, allow=()):
    """(the file's weights, our config, Layout, special tokens' ids, the tokenizer's files, Quantization).

    allow: fields that no list knows and that the caller takes to be harmless. Quantization: MXFP4, where all
    experts of a gpt-oss are stored in it, since their codes are kept; else None.
    """
    file = GGUFFile(path)
    model_name, architecture = page_of(file)
    kind = PAGES[model_name].GGUF[architecture]
    config = read_config(file, model_name, kind, allow)
    experts = {tensor.type for name, tensor in file.tensors.items() if name.endswith("_exps.weight")}
    stored = Quantization("mxfp4", 32) if kind.codes and experts == {"MXFP4"} else None
    layout = their_layout(model_name, architecture, config).stored_in(stored)
    if "lm_head.weight" in layout.tied(config) and differs(file, "output.weight", "token_embd.weight"):
        layout.skipped["output.weight"] = "tied: the embedding's matrix, rounded in another way"
    weights = InCodes(file) if stored else kind.join(file)
    files = tokenizer_files(file) | pooling_files(file)
    return weights, config, layout, special_ids(file.fields), files, stored


def page_of(file):
    """(our model, the file's architecture)."""
    architecture = file.fields.get("general.architecture")
    known = {name: model for model, page in PAGES.items() for name in getattr(page, "GGUF", {})}
    if not isinstance(architecture, str) or architecture not in known:
        raise UserError(
            f"{file.path}: general.architecture is {printable(repr(architecture))}; "
            f"read are {', '.join(sorted(known))}"
        )
    return known[architecture], architecture


# The config -------------------------------------------------------------------------------------------------


def read_config(file, model_name, kind, allow):
    """Our flat config."""
    fields = of_architecture(file)
    refuse_fields(file, fields, kind, allow)
    _, config = from_hf_config({"model_type": kind.model_types[0]})
    given = {ours: fields[theirs] for ours, theirs in (FIELDS | kind.fields).items() if theirs in fields}
    missing = [
        FIELDS[name] for name in ("max_seq_len", "d_model", "num_layers", "num_heads") if name not in given
    ]
    if missing:
        raise UserError(f"{file.path}: lacks {', '.join(missing)}; fetch it again")
    with reading(file.path):
        refuse_counts(file, given)
        derived = {
            **{ours: file.entries[name].shape[0] for ours, name in COUNTED.items() if name in file.entries},
            "num_kv_heads": given["num_heads"],
            "head_dim": given["d_model"] // max(1, given["num_heads"]),
            "rope_base": 10000.0,
            "tied_head": "output.weight" not in file.entries,
            **{ours: any(name in file.entries for name in names) for ours, names in BIASES.items()},
        }
        found = {**derived, **{name: plainly(value) for name, value in given.items()}}
        config |= {name: value for name, value in found.items() if name in config}
        config |= {name: value for name, value in kind.read(fields, config).items() if name in config}
    width = config.get("head_dim")
    if "rotary_dim" not in config and given.get("rotary_dim", width) != width:
        raise UserError(f"{file.path}: RoPE turns a part of a head, which models/{model_name}.py does not")
    if "rope_freqs.weight" in file.entries:
        if not hasattr(PAGES[model_name], "scaling_of"):
            raise UserError(f"{file.path}: has rope_freqs.weight, which models/{model_name}.py does not know")
        page = PAGES[model_name]
        config["rope_scaling"] = page.scaling_of(file.read("rope_freqs.weight"), config, file.path)
    return config


def refuse_counts(file, given):
    """Stop at numbers of layers and experts that the tensors belie, before lists of that length are made."""
    most = {"num_layers": max(1, len(file.entries))}
    routers = [entry for name, entry in file.entries.items() if name.endswith("ffn_gate_inp.weight")]
    most["num_experts"] = max((router.shape[0] for router in routers), default=0)
    for name, limit in most.items():
        value = given.get(name, 0)
        if type(value) is not int or not 0 <= value <= limit:
            theirs = (FIELDS | EXPERTS)[name]
            raise UserError(f"{file.path}: {theirs} is {value!r}, where its tensors are for {limit} at most")


def of_architecture(file):
    """The fields behind the architecture's name."""
    prefix = f"{file.fields['general.architecture']}."
    return {
        name.removeprefix(prefix): value for name, value in file.fields.items() if name.startswith(prefix)
    }


def refuse_fields(file, fields, kind, allow):
    """Stop at values that our pages do not implement, and at fields that nobody here has heard of."""
    read = {*FIELDS.values(), *kind.fields.values(), *kind.known}
    problems = [
        f"{name} is {fields[name]!r}, where {values[0]!r} is implemented"
        for name, values in MUST_EQUAL.items()
        if name in fields and name not in read and fields[name] not in values
    ]
    lengths = ("attention.value_length", "attention.key_length")
    if lengths[0] not in read and fields.get(lengths[0]) != fields.get(lengths[1]):
        problems.append(f"{lengths[0]} differs from {lengths[1]}")
    known = {*read, *MUST_EQUAL, "attention.value_length", "vocab_size"}
    strange = [name for name in fields if name not in known and name not in allow]
    if strange:
        options = " ".join(f"--allow {printable(name)}" for name in strange)
        problems.append(
            f"{', '.join(map(printable, strange))} is not known; if logits do not depend on it: {options}"
        )
    for name, value in fields.items():
        if isinstance(value, list):
            problems.append(f"{printable(name)} is a list, a value for each layer; one for all is read")
    if problems:
        raise UserError(f"{file.path}: {'; '.join(problems)}")


# pooling_type -> what sentence-transformers calls it: how one vector is made of those of all tokens.
POOLING = {1: "pooling_mode_mean_tokens", 2: "pooling_mode_cls_token"}


def pooling_files(file):
    """The files in which sentence-transformers says the same; none where the file says nothing."""
    kind = of_architecture(file).get("pooling_type", 0)
    if kind == 0:
        return {}
    if kind not in POOLING:
        known = ", ".join(f"{number} ({name})" for number, name in POOLING.items())
        raise UserError(f"{file.path}: pooling_type is {kind!r}, where {known} are known")
    parts = [("", "Transformer"), ("1_Pooling", "Pooling")]
    modules = [{"path": path, "type": f"sentence_transformers.models.{name}"} for path, name in parts]
    return {
        "modules.json": json.dumps(modules).encode(),
        "1_Pooling/config.json": json.dumps({POOLING[kind]: True}).encode(),
    }


# The tensors ------------------------------------------------------------------------------------------------

# What is left of a transform once llama.cpp's names stand in Hugging Face's place: see gguf_table.py.
PLAINER = {"transpose": "copy", "transpose+split": "split", "split_per_head": "split"}


def their_layout(model_name, architecture, config):
    """Our table with llama.cpp's names in Hugging Face's place; rows that it does not know fall away."""
    layout, kind = LAYOUTS[model_name], PAGES[model_name].GGUF[architecture]
    key = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(key, 1)  # of the first layer, whatever number of layers a file tells
    rows = [their_row(row, names, kind, layout.prefix) for row in layout.rows]
    tied = {} if kind.wants_head else layout.tied(config)
    return Layout(
        rows=[row for row in rows if row] + kind.rows,
        in_codes={"mxfp4": kind.codes},
        skipped={"rope_freqs.weight": "RoPE's scaling, computed from rope_scaling"},
        tied=lambda config: tied,
    )


def their_row(row, names, kind, prefix):
    """A row of Hugging Face's table with llama.cpp's name; None where it has none."""
    template = row.theirs.replace("{n}", "0").replace("{p}", "weight").replace(".{e}", "")
    if not template.endswith((".weight", ".bias")) or "{end}" in template:
        return None
    endings = (".weight", ".bias")
    name = names.get_name(template, endings) or names.get_name(template.removeprefix(prefix), endings)
    if name is None:
        return None
    name = name.replace("blk.0.", "blk.{n}.")
    if "{p}" in row.theirs:
        name = name.removesuffix("weight") + "{p}"
    transform = "per_expert" if "{e}" in row.theirs else PLAINER.get(row.transform, row.transform)
    special = [special for ending, special in kind.transforms.items() if row.ours.endswith(ending)]
    return row._replace(theirs=name, transform=special[0] if special else transform)


def differs(file, one, other):
    """Whether two tensors are stored in different types, so that they are not the same numbers."""
    types = {file.tensors[name].type for name in (one, other) if name in file.tensors}
    return len(types) > 1
