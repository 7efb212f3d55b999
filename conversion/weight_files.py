"""Weights on disk, read and written one tensor at a time, whatever the size of the whole.

    files = open_weights("checkpoints/NAME")     safetensors or .bin, in one file or in shards with an index
    files.entries["model.norm.weight"]           its shape, dtype and file, known without reading any data
    files.read("model.norm.weight")              the tensor, mapped from the file where the format allows

    write_weights(folder, specs, tensors)        safetensors; above 5 GB in shards with an index

A checkpoint comes from strangers: an index may only name files beside it, and a pickle (.bin, .pth) is read
by torch's restricted unpickler, which builds tensors and refuses everything else before any of it runs.
"""

import json
import pickle
import re
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from models.utils.errors import UserError
from models.utils.files import one_line, read_json

MAX_SHARD_BYTES = 5 * 10**9

# How a safetensors header spells the dtypes that a published checkpoint's parameters have.
DTYPE_NAMES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# What quantized weights (models/utils/quantize.py) are written in besides.
CODE_NAMES = {"I8": torch.int8, "U8": torch.uint8}


class Entry(NamedTuple):
    shape: tuple
    dtype: torch.dtype | str  # the header's own word for a dtype that is not one of ours
    file: Path


# Reading ----------------------------------------------------------------------------------------------------


class SafetensorsFile:
    """A header that says where each tensor stands, then the tensors' bytes; nothing in it can run."""

    def __init__(self, path):
        self.path = path
        try:
            self.file = safe_open(path, framework="pt")
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{path}: no whole safetensors file ({one_line(error)}); fetch it again"
            ) from None
        self.entries = {name: self.entry(name) for name in self.file.keys()}  # noqa: SIM118 (no dict)

    def entry(self, name):
        header = self.file.get_slice(name)
        dtype = header.get_dtype()
        return Entry(tuple(header.get_shape()), DTYPE_NAMES.get(dtype, dtype), self.path)

    def read(self, name):
        return self.file.get_tensor(name)

    def forget(self):
        """Nothing to let go: the file is mapped, what was read from it is the caller's."""


class TorchFile:
    """A pickle of tensors, as torch.save writes it: a zip archive today, one stream before torch 1.6.

    The archive is mapped and costs no memory. The stream has to be read whole; `forget` lets it go again.
    """

    def __init__(self, path):
        self.path = path
        self.mapped = is_zip(path)
        self.tensors = load_pickle(path, self.mapped)
        for name, tensor in self.tensors.items():
            if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
                raise UserError(f"{path}: {name!r} is no tensor; a plain state dict is expected")
        self.entries = {
            name: Entry(tuple(tensor.shape), tensor.dtype, path) for name, tensor in self.tensors.items()
        }
        self.forget()

    def read(self, name):
        if self.tensors is None:
            self.tensors = load_pickle(self.path, self.mapped)
        return self.tensors[name]

    def forget(self):
        if not self.mapped:
            self.tensors = None


def load_pickle(path, mapped):
    """The dict of tensors in a .bin or .pth file, without running anything that the file asks for."""
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it wants to run {asked[1]}" if asked else "it is no pickle of tensors"
        raise UserError(
            f"{path}: refused, {reason}; nothing in it was run; get the checkpoint as safetensors"
        ) from None
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{path}: cannot be read ({one_line(error)[:200]}); fetch it again") from None
    if not isinstance(tensors, dict):
        raise UserError(f"{path}: holds a {type(tensors).__name__} where a dict of tensors was expected")
    return tensors


def is_zip(path):
    try:
        with open(path, "rb") as file:
            return file.read(2) == b"PK"
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({one_line(error)}); fetch it again") from None


class Shards:
    """Several files as one: `entries` of all, and `read` from the one that holds the tensor.

    Of files that cannot be mapped only the one read last stays in memory.
    """

    def __init__(self, files):
        self.files = {file.path: file for file in files}
        self.last = files[0]
        self.entries = {}
        for file in files:
            twice = [name for name in file.entries if name in self.entries]
            if twice:
                raise UserError(f"{file.path}: {twice[0]} is also in {self.entries[twice[0]].file.name}")
            self.entries.update(file.entries)

    def read(self, name):
        file = self.files[self.entries[name].file]
        if file is not self.last:
            self.last.forget()
        self.last = file
        return file.read(name)


KINDS = {"model.safetensors": SafetensorsFile, "pytorch_model.bin": TorchFile}


def open_weights(folder):
    """The weights of a folder in Hugging Face's layout, or of a converted one; safetensors come first."""
    folder = Path(folder)
    for name, kind in KINDS.items():
        if (folder / name).is_file():
            return Shards([kind(folder / name)])
        index = folder / f"{name}.index.json"
        if index.is_file():
            return open_shards(index, kind)
    raise UserError(
        f"{folder}: no weights; model.safetensors or pytorch_model.bin, or the .index.json of its shards, "
        "is expected"
    )


def open_shards(index, kind):
    """The files that an index names, all of them there and holding what the index says."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index}: no weight_map from tensor to file; fetch it again")
    names = sorted({name if isinstance(name, str) else repr(name) for name in weight_map.values()})
    for name in names:
        # Path(...).name also undoes "..", absolute paths and folders; Windows' backslash is caught by hand.
        if Path(name).name != name or "\\" in name:
            raise UserError(
                f"{index}: names {name!r}, which is no file beside it; do not trust this checkpoint"
            )
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise UserError(f"{index}: names files that are not there: {', '.join(missing)}; fetch them")

    shards = Shards([kind(index.parent / name) for name in names])
    lost = [
        name for name, file in weight_map.items() if name not in shards.files[index.parent / file].entries
    ]
    if lost:
        raise UserError(
            f"{index}: {lost[0]} is not in {weight_map[lost[0]]} ({len(lost)} such); fetch both again"
        )
    return shards


# Writing ----------------------------------------------------------------------------------------------------


class Spec(NamedTuple):
    """A tensor that is going to be written."""

    name: str
    shape: tuple
    dtype: torch.dtype

    @property
    def num_bytes(self):
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def write_weights(folder, specs, tensors):
    """Write model.safetensors, or shards of up to MAX_SHARD_BYTES and their index.

    tensors: an iterator that makes the tensor of each spec when its turn comes, so that only one is alive.
    """
    shards = [[]]
    for spec in specs:
        if shards[-1] and sum(each.num_bytes for each in shards[-1]) + spec.num_bytes > MAX_SHARD_BYTES:
            shards.append([])
        shards[-1].append(spec)
    if len(shards) == 1:
        write_safetensors(folder / "model.safetensors", specs, tensors)
        return

    weight_map = {}
    for i, shard in enumerate(shards):
        name = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        write_safetensors(folder / name, shard, tensors)
        weight_map |= {spec.name: name for spec in shard}
    index = {"metadata": {"total_size": sum(spec.num_bytes for spec in specs)}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def write_safetensors(path, specs, tensors):
    """The whole format: the header's length in 8 bytes, the header as JSON, the tensors back to back."""
    spelled = {dtype: name for name, dtype in (DTYPE_NAMES | CODE_NAMES).items()}
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for spec in specs:
        begin, end = end, end + spec.num_bytes
        header[spec.name] = {
            "dtype": spelled[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [begin, end],
        }
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # so that the tensors are aligned for whoever maps the file

    with open(path, "wb") as file:
        file.write(len(encoded).to_bytes(8, "little"))
        file.write(encoded)
        for spec in specs:
            write_tensor(file, next(tensors), spec)


def write_tensor(file, tensor, spec):
    assert tuple(tensor.shape) == spec.shape and tensor.dtype == spec.dtype, spec.name
    file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
