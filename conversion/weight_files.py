"""Weights on disk in other people's formats, and written in ours, one tensor at a time.

    files = open_weights("checkpoints/NAME")     safetensors or .bin, in one file or in shards with an index
    files.entries["model.norm.weight"]           its shape, dtype and file, known without reading any data
    files.read("model.norm.weight")              the tensor, mapped from the file where the format allows

    write_weights(folder, specs, tensors)        safetensors; above 5 GB in shards with an index

safetensors are read by models/utils/safetensors_files.py. A pickle (.bin, .pth) comes from strangers: torch's
restricted unpickler builds tensors from it and refuses everything else before any of it runs.
"""

import json
import pickle
import re
import zipfile
from pathlib import Path
from typing import NamedTuple

import torch

from models.utils.errors import UserError
from models.utils.files import plain_file, reading
from models.utils.safetensors_files import (
    CODE_NAMES,
    DTYPE_NAMES,
    Entry,
    SafetensorsFile,
    Shards,
    open_shards,
)

MAX_SHARD_BYTES = 5 * 10**9

# Reading ----------------------------------------------------------------------------------------------------


class TorchFile:
    """A pickle of tensors, as torch.save writes it: a zip archive today, one stream before torch 1.6.

    The archive is mapped and costs no memory. The stream has to be read whole; `forget` lets it go again.
    """

    def __init__(self, path, then="fetch it again"):
        self.path, self.then = plain_file(path, then=then), then
        with reading(path, then), open(path, "rb") as file:
            self.mapped = file.read(2) == b"PK"
        if self.mapped:
            refuse_compressed(path)
        self.tensors = self.load()
        for name, tensor in self.tensors.items():
            refuse_strange(path, name, tensor)
        self.entries = {
            name: Entry(tuple(tensor.shape), tensor.dtype, path) for name, tensor in self.tensors.items()
        }
        self.forget()

    def load(self):
        """The dict of tensors, without running anything that the file asks for."""
        with reading(self.path, self.then):
            try:
                tensors = torch.load(self.path, map_location="cpu", weights_only=True, mmap=self.mapped)
            except pickle.UnpicklingError as error:
                asked = re.search(r"GLOBAL (\S+)", str(error))
                reason = f"it wants to run {asked[1]}" if asked else "it is no pickle of tensors"
                raise UserError(
                    f"{self.path}: refused, {reason}; nothing in it was run; get it as safetensors"
                ) from None
        if not isinstance(tensors, dict):
            held = type(tensors).__name__
            raise UserError(f"{self.path}: holds a {held} where a dict of tensors was expected")
        return tensors

    def read(self, name):
        if self.tensors is None:
            self.tensors = self.load()
        return self.tensors[name]

    def forget(self):
        if not self.mapped:
            self.tensors = None


def refuse_compressed(path):
    """torch.save does not compress; a small archive may hide a part that would not fit into memory."""
    with reading(path), zipfile.ZipFile(path) as archive:
        if any(part.file_size > part.compress_size for part in archive.infolist()):
            raise UserError(f"{path}: is a compressed archive, which torch does not write; fetch it again")


def refuse_strange(path, name, tensor):
    """Only plain tensors, whose numbers are all in the file, and which have names."""
    if not isinstance(name, str):
        raise UserError(f"{path}: has a {type(name).__name__} for a name; a plain state dict is expected")
    if not isinstance(tensor, torch.Tensor):
        raise UserError(f"{path}: {name!r} is a {type(tensor).__name__}; a plain state dict is expected")
    with reading(path):
        dense = tensor.layout == torch.strided and not tensor.is_nested and not tensor.is_quantized
        whole = (
            dense
            and tensor.device.type == "cpu"
            and (tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes())
        )
    if not whole:
        raise UserError(
            f"{path}: {name!r} is no plain tensor with all its numbers in the file; fetch it again"
        )


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
