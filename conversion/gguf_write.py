"""A converted checkpoint as a GGUF file, which llama.cpp reads: conversion/gguf.py says what stands in one.

    python convert_hf_checkpoint.py tiny-llama-python --gguf Q8_0

Matrices are written in F32, F16, Q8_0 or Q4_0 (in blocks of 32 weights of a row; a matrix whose rows are no
whole blocks in F16). Norms, biases and a few small matrices are always in F32; MXFP4 stays what it is. What
has to be known for this is what reading knows: the same tables, their transforms the other way round. The
tokenizer's part is in conversion/gguf_vocabulary.py.
Proof: tests/test_gguf_write.py; tests/test_gguf_tokenizers.py, also by transformers and llama.cpp.
"""

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import gguf
import numpy as np
import torch
from tqdm import tqdm

from conversion.checkpoint import read_or_convert
from conversion.find import find_folder
from conversion.gguf import scale_name
from conversion.gguf_model import POOLING, their_layout
from conversion.gguf_table import FIELDS, GGUFType
from conversion.gguf_vocabulary import vocabulary_fields
from conversion.match import compare, stop_if, wanted_shapes
from conversion.tables import HF_TYPES, PAGES, from_hf_config, to_hf_config
from conversion.tensor_table import Layout, plan
from conversion.weight_files import open_weights
from models import config_from_dict
from models.llama import rope_frequencies
from models.utils.errors import UserError
from models.utils.files import read_json, write_atomically
from models.utils.quantize import stored_quantization, unpack

TYPES = {name: gguf.GGMLQuantizationType[name] for name in ("F32", "F16", "Q8_0", "Q4_0")}
MXFP4 = gguf.GGMLQuantizationType.MXFP4
FILE_TYPES = {"F32": 0, "F16": 1, "Q8_0": 7, "Q4_0": 2}  # general.file_type, as llama.cpp numbers them
# Matrices that are F32 in every file: what chooses experts, and tables of positions and segments.
ALWAYS_F32 = ("ffn_gate_inp.weight", "position_embd.weight", "token_types.weight")


def export(name, kind, out=None, progress=True):
    """Write the checkpoint called `name` as a GGUF file with its matrices in `kind`, and return its path.

    out: the file's path; else it goes beside the converted folder, under the checkpoint's name and the kind.
    """
    if out and Path(out).suffix != ".gguf":
        raise UserError(f"--out {out}: is no name of a .gguf file; give one that ends in .gguf")
    converted, config = read_or_convert(find_folder(name))
    where = converted / "config.json"
    stored = stored_quantization(config, where)
    if stored and stored.kind != "mxfp4":
        raise UserError(
            f"{converted}: is {stored}, and what rounding took is gone; convert the original again without "
            "--quantize, then write that as GGUF"
        )
    model_name, _ = config_from_dict(config, where)
    try:
        their = described(model_name, config)
    except UserError as error:
        raise UserError(f"{converted}: {error}") from None
    weights = open_weights(converted)
    stop_if(compare(wanted_shapes(config, where, stored), plain(weights.entries), ()), converted)
    folder = converted.parent if converted.name == "converted" else converted
    fields = {**vocabulary_fields(converted, config), "general.name": folder.name}
    if "pooling_type" in their.kind.known:
        fields[f"{their.architecture}.pooling_type"] = pooling_type(converted)
    path = Path(out or folder / f"{folder.name}.{kind}.gguf")
    with write_atomically(path) as new:
        write_gguf(new, model_name, config, weights.read, fields, kind, stored, progress)
    return path


def pooling_type(folder):
    """How a sentence encoder makes one vector of those of all tokens: as its files say, or the mean."""
    path = next(folder.glob("*_Pooling/config.json"), None)
    if path is None or not (folder / "modules.json").is_file():
        return 1
    modes = [name for name, value in read_json(path).items() if name.startswith("pooling_mode_") and value]
    kinds = [kind for kind, name in POOLING.items() if modes == [name]]
    if not kinds:
        raise UserError(
            f"{path}: asks for {', '.join(modes)}; a GGUF file says one of {list(POOLING.values())}"
        )
    return kinds[0]


def plain(entries):
    """Entries of which codes count as numbers, for a comparison of names and shapes."""
    return {name: entry._replace(dtype=torch.float32) for name, entry in entries.items()}


def write_gguf(path, model_name, config, read, fields, kind, stored=None, progress=False):
    """Write a file at `path`.

    config: ours, flat. read: from a name of ours to its tensor, asked for one at a time. fields: of the file,
    by their names, beside those that describe the model. kind: a name of TYPES. stored: what experts are in.
    """
    their = described(model_name, config)
    tensors = planned(their, read, kind, stored)
    writer = gguf.GGUFWriter(path, their.architecture)
    fields = {**model_fields(their), "general.file_type": FILE_TYPES[kind], **fields}
    fields["general.quantization_version"] = gguf.GGML_QUANT_VERSION
    for name, value in fields.items():
        writer.add_key_value(name, value, field_type(value))
    for tensor in tensors:
        size = tensor.num_bytes
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), size, tensor.type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    total = sum(tensor.num_bytes for tensor in tensors)
    with tqdm(total=total, unit="B", unit_scale=True, disable=None if progress else True) as bar:
        for tensor in tensors:
            writer.write_tensor_data(tensor.make())
            bar.update(tensor.num_bytes)
    writer.close()


# The model --------------------------------------------------------------------------------------------------


class Described(NamedTuple):
    """A model as llama.cpp has it, under the name of the page whose table says how."""

    architecture: str
    kind: GGUFType
    config: dict  # of that page
    layout: Layout
    tied: dict  # tensors of ours that are written though they are another's: {name: whose}


def described(model_name, config):
    """UserError where llama.cpp has no such model.

    What several pages can read, as Llama, is described by the page that reads it where none is asked for.
    """
    hf_config = to_hf_config(model_name, config)
    model_type = hf_config["model_type"]
    page = HF_TYPES[model_type].model if model_type in HF_TYPES else model_name
    found = [
        (name, kind)
        for name, kind in getattr(PAGES[page], "GGUF", {}).items()
        if model_type in kind.model_types
    ]
    if not found:
        raise UserError(f"llama.cpp has no model like {model_name} ({model_type}), and GGUF no name for it")
    architecture, kind = found[0]
    if page != model_name:
        config = from_hf_config(hf_config)[1]
    kind.write(config)  # which refuses what llama.cpp does not have
    layout = their_layout(page, architecture, config)
    tied = PAGES[page].LAYOUT.tied(config) if kind.wants_head else {}
    return Described(architecture, kind, config, layout, tied)


def model_fields(their):
    """The sizes and constants, by their full names."""
    config, kind = their.config, their.kind
    given = {theirs: config[ours] for ours, theirs in (FIELDS | kind.fields).items() if ours in config}
    if "rope_base" in config:
        head_dim = config.get("head_dim", config["d_model"] // config["num_heads"])
        given = {
            "attention.head_count_kv": config["num_heads"],
            "attention.key_length": head_dim,
            "attention.value_length": head_dim,
            "rope.dimension_count": head_dim,
            **given,
        }
    given |= kind.write(config)
    return {n if n.startswith("tokenizer.") else f"{their.architecture}.{n}": v for n, v in given.items()}


def field_type(value):
    """How a value is stored; all whole numbers of a model are sizes."""
    if type(value) is int:
        return gguf.GGUFValueType.UINT32
    return gguf.GGUFValueType.get_type(value)


# The tensors ------------------------------------------------------------------------------------------------


class Planned(NamedTuple):
    """A tensor that is going to be written."""

    name: str
    shape: tuple
    type: gguf.GGMLQuantizationType
    make: Callable  # () -> its numbers or blocks, a numpy array

    @property
    def num_bytes(self):
        per_block, block_bytes = gguf.GGML_QUANT_SIZES[self.type]
        return torch.Size(self.shape).numel() // per_block * block_bytes


def planned(their, read, kind, stored=None):
    """A Planned for each tensor of the file, in the order of our model's."""
    config, layout = their.config, their.layout.stored_in(stored)
    shapes = wanted_shapes(config, their.architecture, stored)
    shapes |= {name: shapes[same] for name, same in their.tied.items()}
    steps = plan(layout, config, list(shapes))
    refuse_strange(their, set(shapes).difference(*(step.ours for step in steps)))
    by_name, tensors = {step.theirs: step for step in steps}, []
    for step in steps:
        parts = theirs_of(step, their, lambda name: torch.empty(shapes[name], device="meta"))
        if step.row not in layout.codes:
            for name, tensor in parts.items():
                type = type_of(name, tensor.shape, kind)
                make = partial(numbers, step, their, read, name, type)
                tensors.append(Planned(name, tuple(tensor.shape), type, make))
        elif step.theirs.endswith(".weight"):
            *rows, num_bytes = parts[step.theirs].shape
            make = partial(blocks, step, by_name[scale_name(step.theirs)], their, read)
            tensors.append(Planned(step.theirs, (*rows, 2 * num_bytes), MXFP4, make))
    if config.get("rope_scaling") and their.architecture == "llama":
        divisors = frequency_divisors(config)
        tensors.append(Planned("rope_freqs.weight", tuple(divisors.shape), TYPES["F32"], divisors.numpy))
    return tensors


def theirs_of(step, their, read):
    """{name: tensor} of what a step writes; read: from a name of ours to its tensor."""
    tensors = [read(their.tied.get(name, name)) for name in step.ours]
    return their.kind.split(step.theirs, step.transform.inverse(tensors, their.config), their.config)


def numbers(step, their, read, name, type):
    """A tensor as the file has it, rounded to its type."""
    tensor = theirs_of(step, their, read)[name].detach().float().contiguous()
    if type == TYPES["F16"] and tensor.abs().max() > torch.finfo(torch.float16).max:
        raise UserError(f"{name}: has weights too large for F16; write F32 or Q8_0 instead")
    return gguf.quants.quantize(tensor.numpy(), type)


def blocks(step, scale_step, their, read):
    """MXFP4's blocks of 17 bytes: a scale, then 32 codes, of which byte i has code i and code i + 16."""
    codes = theirs_of(step, their, read)[step.theirs]
    scales = theirs_of(scale_step, their, read)[scale_step.theirs]
    codes = torch.stack([unpack(rows) for rows in codes]).unflatten(-1, (-1, 32))
    packed = codes[..., :16] | codes[..., 16:] << 4
    return torch.cat([scales[..., None], packed], dim=-1).flatten(-2).numpy()


def refuse_strange(their, names):
    """Tensors of ours that have no place in the file: a UserError, or a line about those one does without."""
    known = their.kind.left_out.items()
    without = {name: what for name in names for part, what in known if name.startswith(part)}
    if strange := sorted(names - set(without)):
        raise UserError(f"llama.cpp's {their.architecture} has no place for {', '.join(strange[:9])}")
    for what in dict.fromkeys(without.values()):
        count = sum(reason == what for reason in without.values())
        print(f"left out: {count} tensors of what {what}, which llama.cpp does not have", file=sys.stderr)


def type_of(name, shape, kind):
    """The type that a tensor is written in: rows that are no whole blocks cannot be quantized."""
    if len(shape) == 1 or not name.endswith(".weight") or name.endswith(ALWAYS_F32):
        return TYPES["F32"]
    per_block, _ = gguf.GGML_QUANT_SIZES[TYPES[kind]]
    return TYPES["F16"] if shape[-1] % per_block else TYPES[kind]


def frequency_divisors(config):
    """What llama.cpp divides each pair's frequency by: Llama 3.1's scaling is given to it as numbers."""
    built, cpu = config_from_dict(config, "config.json")[1], torch.device("cpu")
    return rope_frequencies(replace(built, rope_scaling=None), cpu) / rope_frequencies(built, cpu)
