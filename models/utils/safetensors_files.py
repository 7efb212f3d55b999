"""Weights on disk as safetensors, in one file or in several that an index names, read one tensor at a time.

    files = open_safetensors("checkpoints/NAME/converted")
    files.entries["final_norm.weight"]           its shape, dtype and file, known without reading any data
    files.read("final_norm.weight")              the tensor, mapped from the file

A checkpoint comes from strangers: an index may only name files beside it.
"""

from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open

from models.utils.errors import UserError
from models.utils.files import plain_file, read_json, reading

# How a safetensors header spells the dtypes that a published checkpoint's parameters have.
DTYPE_NAMES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# What quantized weights (models/utils/quantize.py) are written in besides.
CODE_NAMES = {"I8": torch.int8, "U8": torch.uint8}


class Entry(NamedTuple):
    shape: tuple
    dtype: torch.dtype | str  # the header's own word for a dtype that is not one of ours
    file: Path


class SafetensorsFile:
    """A header that says where each tensor stands, then the tensors' bytes; nothing in it can run."""

    def __init__(self, path, then="fetch it again"):
        self.path, self.then = plain_file(path, then=then), then
        with reading(path, then):
            self.file = safe_open(path, framework="pt")
            self.entries = {name: self.entry(name) for name in self.file.keys()}  # noqa: SIM118 (no dict)

    def entry(self, name):
        header = self.file.get_slice(name)
        dtype = header.get_dtype()
        return Entry(tuple(header.get_shape()), DTYPE_NAMES.get(dtype, dtype), self.path)

    def read(self, name):
        with reading(self.path, self.then):
            return self.file.get_tensor(name)

    def read_part(self, name, part):
        """part: a slice per dimension; nothing else is read."""
        with reading(self.path, self.then):
            return self.file.get_slice(name)[part]

    def forget(self):
        """Nothing to let go: the file is mapped, what was read from it is the caller's."""


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

    def read_part(self, name, part):
        return self.files[self.entries[name].file].read_part(name, part)

    def read(self, name):
        file = self.files[self.entries[name].file]
        if file is not self.last:
            self.last.forget()
        self.last = file
        return file.read(name)


def open_safetensors(folder, then="convert the checkpoint again"):
    """The weights of a folder that has model.safetensors or its shards; `then` is what an error advises."""
    path = Path(folder) / "model.safetensors"
    index = path.with_name(f"{path.name}.index.json")
    if index.is_file() and not path.is_file():
        return open_shards(index, SafetensorsFile, then)
    return Shards([SafetensorsFile(path, then)])


def open_shards(index, kind, then="fetch it again"):
    """The files that an index names, all of them there and holding what the index says."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index}: no weight_map from tensor to file; {then}")
    strange = [name for name in weight_map.values() if not is_file_name(name)]
    if strange:
        raise UserError(
            f"{index}: names {strange[0]!r}, which is no file beside it; do not trust this checkpoint"
        )
    names = sorted(set(weight_map.values()))
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise UserError(f"{index}: names files that are not there: {', '.join(missing)}; {then}")

    shards = Shards([kind(index.parent / name, then) for name in names])
    lost = [
        name for name, file in weight_map.items() if name not in shards.files[index.parent / file].entries
    ]
    if lost:
        raise UserError(f"{index}: {lost[0]} is not in {weight_map[lost[0]]} ({len(lost)} such); {then}")
    return shards


def is_file_name(name):
    # Path(...).name also undoes "..", absolute paths and folders; Windows' backslash is caught by hand.
    is_name = isinstance(name, str) and 0 < len(name) < 256 and Path(name).name == name
    return is_name and "\\" not in name and "\0" not in name
