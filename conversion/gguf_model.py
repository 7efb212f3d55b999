"""Which model of ours a GGUF file holds: its fields as our config, its tensors' names beside ours.

llama.cpp calls sizes and constants the same in all architectures ("llama.block_count", "gpt2.block_count"),
so that one list (FIELDS) reads them all; what a file has no field for is as transformers takes it where
config.json is silent. The names of tensors come in two steps: the tables of conversion/tables/ know Hugging
Face's names of ours, and the gguf package knows llama.cpp's names of those.

Which architectures a page reads, and what llama.cpp changes in them, stands in the page's table as GGUF.
Always changed are two things: a matrix is (outputs, inputs), also GPT-2's, and q, k and v in one matrix
stand one block above the other, also GPT-NeoX's.
Proof: tests/test_gguf.py.
"""

import gguf
import numpy as np

from conversion.gguf import GGUFFile
from conversion.gguf_tokenizer import special_ids, tokenizer_files
from conversion.tables import LAYOUTS, PAGES, from_hf_config
from conversion.tensor_table import Layout
from models.utils.errors import UserError, printable

# Our field -> theirs, behind the architecture's name.
FIELDS = {
    "max_seq_len": "context_length",
    "d_model": "embedding_length",
    "num_layers": "block_count",
    "d_ff": "feed_forward_length",
    "num_heads": "attention.head_count",
    "num_kv_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "rotary_dim": "rope.dimension_count",
    "rope_base": "rope.freq_base",
    "parallel_residual": "use_parallel_residual",
}
NORM_EPS = ("attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon")
# Our field -> a tensor of the first layer that is there where it is true.
BIASES = {
    "qkv_bias": ("blk.0.attn_q.bias", "blk.0.attn_qkv.bias"),
    "attn_bias": ("blk.0.attn_qkv.bias",),
    "o_bias": ("blk.0.attn_output.bias",),
    "ffn_bias": ("blk.0.ffn_up.bias",),
}
# What other fields must say: more than that is not implemented.
MUST_EQUAL = {
    "rope.scaling.type": ("none",),
    "expert_count": (0,),
    "tensor_data_layout": ("Meta AI original pth",),
}


def read_gguf(path, allow=()):
    """(GGUFFile, our config, Layout, special tokens' ids, the tokenizer's files) of a GGUF file.

    allow: fields that no list knows and that the caller takes to be harmless.
    """
    file = GGUFFile(path)
    model_name, model_type, turned = page_of(file)
    config = read_config(file, model_name, model_type, allow)
    layout = their_layout(file, LAYOUTS[model_name], config, turned)
    return file, config, layout, special_ids(file.fields), tokenizer_files(file)


def page_of(file):
    """(our model, Hugging Face's model_type, whose rows llama.cpp turns) of the file's architecture."""
    architecture = file.fields.get("general.architecture")
    known = {
        name: (model, *what)
        for model, page in PAGES.items()
        for name, what in getattr(page, "GGUF", {}).items()
    }
    if architecture not in known:
        raise UserError(
            f"{file.path}: general.architecture is {printable(repr(architecture))}; "
            f"read are {', '.join(sorted(known))}"
        )
    return known[architecture]


# The config -------------------------------------------------------------------------------------------------


def read_config(file, model_name, model_type, allow):
    """Our flat config."""
    fields = of_architecture(file)
    refuse_fields(file, fields, allow)
    _, config = from_hf_config({"model_type": model_type})
    given = {ours: fields[theirs] for ours, theirs in FIELDS.items() if theirs in fields}
    given |= {"norm_eps": fields[name] for name in NORM_EPS if name in fields}  # noqa: B035 (one of the two)
    missing = [
        FIELDS[name] for name in ("max_seq_len", "d_model", "num_layers", "num_heads") if name not in given
    ]
    if missing:
        raise UserError(f"{file.path}: lacks {', '.join(missing)}; fetch it again")
    embedding = file.entries.get("token_embd.weight")
    derived = {
        "vocab_size": embedding.shape[0] if embedding else config["vocab_size"],
        "num_kv_heads": given["num_heads"],
        "head_dim": given["d_model"] // max(1, given["num_heads"]),
        "rope_base": 10000.0,
        "tied_head": "output.weight" not in file.entries,
        **{ours: any(name in file.entries for name in names) for ours, names in BIASES.items()},
    }
    found = {**derived, **{name: plainly(value) for name, value in given.items()}}
    config |= {name: value for name, value in found.items() if name in config}
    if "rotary_dim" not in config and given.get("rotary_dim", config.get("head_dim")) != config.get(
        "head_dim"
    ):
        raise UserError(f"{file.path}: RoPE turns a part of a head, which models/{model_name}.py does not")
    if "rope_freqs.weight" in file.entries:
        page = PAGES[model_name]
        config["rope_scaling"] = page.scaling_of(file.read("rope_freqs.weight"), config, file.path)
    return config


def of_architecture(file):
    """The fields behind the architecture's name."""
    prefix = f"{file.fields['general.architecture']}."
    return {
        name.removeprefix(prefix): value for name, value in file.fields.items() if name.startswith(prefix)
    }


def refuse_fields(file, fields, allow):
    """Stop at values that our pages do not implement, and at fields that nobody here has heard of."""
    problems = [
        f"{name} is {fields[name]!r}, where {values[0]!r} is implemented"
        for name, values in MUST_EQUAL.items()
        if name in fields and fields[name] not in values
    ]
    if fields.get("attention.value_length", None) != fields.get("attention.key_length", None):
        problems.append("attention.value_length differs from attention.key_length")
    known = {*FIELDS.values(), *NORM_EPS, *MUST_EQUAL, "attention.value_length", "vocab_size"}
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


def plainly(value):
    """A float of 32 bits as the decimal that was meant: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


# The tensors ------------------------------------------------------------------------------------------------


def their_layout(file, layout, config, turned):
    """Our table with llama.cpp's names in Hugging Face's place."""
    architecture = file.fields["general.architecture"]
    key = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(key, config["num_layers"])
    rows = [their_row(row, names, turned) for row in layout.rows]
    skipped = {"rope_freqs.weight": "RoPE's scaling, computed from rope_scaling"}
    tied = layout.tied(config)
    if "lm_head.weight" in tied and differs(file, "output.weight", "token_embd.weight"):
        skipped["output.weight"] = "tied: the embedding's matrix, rounded in another way"
    return Layout(rows=rows, skipped=skipped, tied=lambda config: tied)


def their_row(row, names, turned):
    template = row.theirs.replace("{n}", "0").replace("{p}", "weight")
    name = names.get_name(template, (".weight", ".bias"))
    if name is None:
        raise ValueError(f"the gguf package has no name for {row.theirs}")
    name = name.replace("blk.0.", "blk.{n}.")
    if "{p}" in row.theirs:
        name = name.removesuffix("weight") + "{p}"
    transform = "split" if "{q,k,v}" in row.ours else "copy"
    if any(f".{part}." in row.ours for part in turned):
        transform = "pairs_to_halves"
    return row._replace(theirs=name, transform=transform)


def differs(file, one, other):
    """Whether two tensors are stored in different types, so that they are not the same numbers."""
    types = {file.tensors[name].type for name in (one, other) if name in file.tensors}
    return len(types) > 1


def spoken_types(file):
    """How the matrices are stored, for a person: "Q4_1 210, Q8_0 1"."""
    counts = {}
    for tensor in file.tensors.values():
        if len(tensor.shape) > 1:
            counts[tensor.type] = counts.get(tensor.type, 0) + 1
    return ", ".join(f"{kind} {count}" for kind, count in sorted(counts.items(), key=lambda pair: -pair[1]))
