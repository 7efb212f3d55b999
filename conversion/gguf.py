"""GGUF, llama.cpp's form of a checkpoint: config, tokenizer and weights in one file.

    "GGUF" | version | number of tensors | number of fields
    fields      name, type, value:      "llama.block_count"      u32     30
    tensors     name, shape, type, at:  "blk.0.attn_q.weight"    576 x 576   Q4_1   59982848
    zeros, up to a multiple of 32 bytes
    the tensors' numbers, each beginning `at` bytes from here

Whole numbers and floats are little-endian, a text is its length and its UTF-8 bytes, a list its items' type,
its length and the items. Shapes are told innermost first, so that 576 x 1536 is our (1536, 576).

A matrix is stored plainly (F32, F16, BF16) or in blocks, of 32 weights of a row or of 256. A block holds
small integers q, and what turns them into weights again:

    Q8_0    d, q x 32                            w = d q             q in -128 .. 127   8.5 bits a weight
    Q4_0    d, q x 32                            w = d (q - 8)       q in 0 .. 15       4.5
    Q4_1    d, m, q x 32                         w = d q + m                            5
    Q4_K    D, M, (s, t) x 8, q x 256            w = D s q - M t     s, t in 0 .. 63    4.5

Q4_K, of 256 weights in 144 bytes, tells scales themselves in few bits: each of its 8 groups of 32 weights has
a scale s and a minimum t of 6 bits, and the two fp16 numbers D and M say what these are worth.

    | D  M | s0 .. s7, t0 .. t7, 6 bits each | q of 256 weights, 4 bits each |
      4 bytes            12 bytes                       128 bytes

With D = 0.01, M = 0.02 and a group of s = 20, t = 30, code 9 means 0.01 * 20 * 9 - 0.02 * 30 = 1.2; the
group's 16 levels go from -0.6 to 2.4. Other types that end in _K are built alike. The gguf package turns all
of them into numbers; Q4_0 and Q4_1 are read here as well, since they are what models/utils/quantize.py calls
int4: w = scale (q - 8) + zero.

A file comes from strangers: every length in it is compared with what is left of the file before it is used.
Shapes: N outputs and K inputs of a layer.
Proof: tests/test_gguf.py, against the gguf package's own reader and llama.cpp's own arithmetic.
"""

import mmap
import struct
from pathlib import Path

import gguf
import numpy as np
import torch

from models.utils.errors import UserError, printable
from models.utils.files import plain_file, reading
from models.utils.safetensors_files import Entry

PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
IN_BLOCKS = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "MXFP4")
INT4 = ("Q4_0", "Q4_1")

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
TEXT, LIST = 8, 9  # the other two types of a field
MOST = 2**22  # fields, tensors, items of a list, bytes of a text: no model has as many


class GGUFFile:
    """A GGUF file, mapped: `fields` by name, `entries` of its tensors, `read` for one of them."""

    def __init__(self, path):
        self.path = plain_file(path)
        with reading(path):
            with open(path, "rb") as file:
                self.bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            header = Header(self.bytes, path)
            self.fields, self.tensors = header.read()
            self.entries = {
                name: Entry(tensor.shape, PLAIN.get(tensor.type, torch.float32), Path(path))
                for name, tensor in self.tensors.items()
            }

    def read(self, name):
        """The tensor, in fp32 where it is stored in blocks."""
        tensor = self.tensors[name]
        with reading(self.path):
            if tensor.type in PLAIN:
                numbers = torch.frombuffer(self.bytes_of(tensor), dtype=PLAIN[tensor.type])
                return numbers.view(tensor.shape)
            kind = gguf.GGMLQuantizationType[tensor.type]
            return torch.from_numpy(gguf.quants.dequantize(self.rows(tensor), kind))

    def read_int4(self, name):
        """(codes (N, K) uint8, scale (N, K / 32), zero (N, K / 32)) in fp32, of a matrix that is int4.

        None for any other. w = scale * (code - 8) + zero.
        """
        tensor = self.tensors[name]
        if tensor.type not in INT4 or len(tensor.shape) != 2:
            return None
        blocks = self.rows(tensor).reshape(tensor.shape[0], tensor.shape[1] // 32, -1)
        numbers = 2 if tensor.type == "Q4_1" else 1  # fp16, before the codes
        head = np.ascontiguousarray(blocks[..., : 2 * numbers]).view(np.float16).astype(np.float32)
        codes = halves(torch.from_numpy(blocks[..., 2 * numbers :].copy())).flatten(1)
        scale = torch.from_numpy(head[..., 0].copy())
        zero = torch.from_numpy(head[..., 1].copy()) + 8 * scale if numbers == 2 else torch.zeros_like(scale)
        return codes, scale, zero

    def read_mxfp4(self, name):
        """(codes (..., K) uint8, scales (..., K / 32) uint8) of a tensor of that type, see quantize.py."""
        tensor = self.tensors[name]
        with reading(self.path):
            blocks = torch.from_numpy(self.rows(tensor).copy()).unflatten(-1, (-1, 17))
            return halves(blocks[..., 1:]).flatten(-2), blocks[..., 0]

    def rows(self, tensor):
        """The bytes of a tensor in blocks, a row for each row of the tensor."""
        data = np.frombuffer(self.bytes_of(tensor), dtype=np.uint8)
        return data.reshape(*tensor.shape[:-1], -1)

    def bytes_of(self, tensor):
        # A copy, since torch wants memory that it may write; a tensor's worth at a time.
        return bytearray(self.bytes[tensor.begin : tensor.end])

    def forget(self):
        """Nothing to let go: the file is mapped, and what was read from it is the caller's."""


class InCodes:
    """A GGUFFile that gives MXFP4 as it is stored: NAME.weight has the codes, NAME.scale the scales.

    Two codes are a byte, as models/utils/quantize.py packs them: neighbours of a row.
    """

    def __init__(self, file):
        self.file, self.path, self.forget, self.entries = file, file.path, file.forget, {}
        for name, entry in file.entries.items():
            if file.tensors[name].type == "MXFP4":
                *rows, K = entry.shape
                self.entries[name] = Entry((*rows, K // 2), "U8", entry.file)
                self.entries[scale_name(name)] = Entry((*rows, K // 32), "U8", entry.file)
            else:
                self.entries[name] = entry

    def read(self, name):
        weight = name.removesuffix("scale") + "weight" if name not in self.file.entries else name
        if self.file.tensors[weight].type != "MXFP4":
            return self.file.read(name)
        codes, scales = self.file.read_mxfp4(weight)
        return scales if weight != name else codes[..., 0::2] | codes[..., 1::2] << 4


def scale_name(name):
    return name.removesuffix("weight") + "scale"


def halves(pairs):
    """The 32 codes of a block from 16 bytes: byte i has code i in its low half, i + 16 in its high one."""
    return torch.cat([pairs & 15, pairs >> 4], dim=-1)


class Stored:
    """Where a tensor stands and how it is stored."""

    def __init__(self, shape, type, begin):
        self.shape, self.type, self.begin = shape, type, begin
        per_block, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[type]]
        if shape and shape[-1] % per_block:
            raise ValueError(f"a row of {shape[-1]} numbers is no whole number of blocks of {type}")
        self.end = begin + torch.Size(shape).numel() // per_block * block_bytes


class Header:
    """Reads the file's beginning, front to back."""

    def __init__(self, data, path):
        self.data, self.path, self.at = data, path, 0

    def read(self):
        """(the fields by name, a Stored for each tensor by name)."""
        if self.take(4) != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        version = self.number("I")
        if version not in (2, 3):
            raise ValueError(f"version {version}, where 2 and 3 are known")
        num_tensors, num_fields = self.count(24, "tensors"), self.count(13, "fields")
        fields = {}
        for _ in range(num_fields):
            name = self.text()
            if name in fields:
                raise ValueError(f"has the field {printable(name)} twice")
            fields[name] = self.value(self.number("I"))
        tensors = [self.tensor() for _ in range(num_tensors)]
        return fields, self.placed(tensors, fields.get("general.alignment", 32))

    def take(self, size):
        if size > len(self.data) - self.at:
            raise ValueError(f"ends in the middle: {size:,} bytes are wanted at byte {self.at:,}")
        self.at += size
        return self.data[self.at - size : self.at]

    def number(self, code):
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def count(self, smallest, what):
        """A number of things of at least `smallest` bytes each, for which there must be room."""
        count = self.number("Q")
        if count > MOST or count * smallest > len(self.data) - self.at:
            raise ValueError(f"says that it has {count:,} {what}, for which it is too short")
        return count

    def text(self):
        content = self.take(self.count(1, "bytes of a text"))
        try:
            return content.decode("utf-8")
        except UnicodeDecodeError:
            raise ValueError(f"has a text that is no UTF-8 ({content[:20]!r})") from None

    def value(self, kind):
        if kind in SCALARS:
            return self.number(SCALARS[kind])
        if kind == TEXT:
            return self.text()
        if kind != LIST:
            raise ValueError(f"has a field of type {kind}, which does not exist")
        kind = self.number("I")
        if kind == TEXT:
            return [self.text() for _ in range(self.count(8, "texts"))]
        if kind not in SCALARS:
            raise ValueError(f"has a list of type {kind}; only numbers and texts are known in lists")
        size = struct.calcsize("<" + SCALARS[kind])
        count = self.count(size, "numbers")
        return list(struct.unpack(f"<{count}{SCALARS[kind]}", self.take(count * size)))

    def tensor(self):
        """(name, shape with the innermost dimension last, type, where its numbers begin)."""
        name, num_dims = self.text(), self.number("I")
        if num_dims > 4:
            raise ValueError(f"{printable(name)} has {num_dims} dimensions, where up to 4 are known")
        shape = tuple(reversed([self.number("Q") for _ in range(num_dims)]))
        kind, begin = self.number("I"), self.number("Q")
        known = {kind.value: kind.name for kind in gguf.GGMLQuantizationType}
        if known.get(kind) not in (*PLAIN, *IN_BLOCKS):
            raise UserError(
                f"{self.path}: {printable(name)} is stored as {known.get(kind, f'type {kind}')}; read are "
                f"{', '.join([*PLAIN, *IN_BLOCKS])}; take the file of another type"
            )
        return name, shape, known[kind], begin

    def placed(self, tensors, alignment):
        """{name: Stored}, all of them inside the file."""
        if type(alignment) is not int or alignment not in (2**n for n in range(3, 17)):
            raise ValueError(f"general.alignment is {alignment!r}, where a power of 2 is expected")
        start, found = self.at + -self.at % alignment, {}
        for name, shape, kind, begin in tensors:
            if name in found:
                raise ValueError(f"has the tensor {printable(name)} twice")
            stored = Stored(shape, kind, start + begin)
            if begin % alignment or stored.end > len(self.data):
                raise ValueError(f"{printable(name)} {shape} does not lie in the file; is it whole?")
            found[name] = stored
        return found
