"""A few rows times a matrix in 8 or 4 bits, at the speed of memory: what makes llama.cpp fast, on one page.

To make a token, every weight is read once and used once, and memory is slower than the core. So the fewest
bytes win, provided that making numbers of them costs next to nothing. This is how weights lie in memory for
that, and what tiled_linear.cpp does with them.

A register is cut into lanes of 32 bits: 16 in AVX-512, 8 in AVX2. What an instruction does, it does in every
lane. Let a lane be an output, a row of the weight, and hold a sum: then 16 or 8 sums grow side by side, none
is ever added to another, and the activations are the same for all. A lane holds 4 codes of weights as well,
a byte each. So one step takes 4 inputs of 16 or 8 outputs:

    AVX-512 VNNI    vpdpbusd               4 products, all of them added to the lane's sum: 64 at once
    AVX-VNNI        vpdpbusd               the same in 8 lanes: 32 at once
    AVX2            vpmaddubsw             4 products, each two of them added: two sums of 16 bits
                    vpmaddwd, vpaddd       these two added (times one, in 32 bits), and that to the lane's sum

Three instructions do the work of one where that one is missing, and mostly they need not. An unsigned byte
times a signed one is what both multiply: code times activation. In int4 a code is at most 15 and an
activation 127, so two products are at most 3,810, and eight of these fit into 16 bits, which end at 32,767:
the last two instructions are taken once in 32 inputs. In int8 two products of 255 and 127 would be too much.
There the weight q itself is taken, its size times x with the sign of q: at most 2 * 128 * 127 = 32,512. All
loops have the same whole numbers, and so the same results to the bit. Where a processor has none of these
instructions (NEON's were not tried), a plain loop is there for what torch has no kernel for.

In int8 the bytes are there as vpdpbusd needs them, q + 128 each:

    a tile: 32 outputs by all K inputs, in the order in which it is read                  128 + 32 K bytes

    |  s  |  s  | ... |  s  |   scale of outputs 0 to 31, fp32                            128
    |  0  |  1  | ... | 31  |   inputs 0 to 3 of each: 4 bytes                            128
    |  0  |  1  | ... | 31  |   inputs 4 to 7                                             128
      ...

In int4 two codes share a byte, and each group of inputs has scales and zeros of its own:

    a tile: 32 outputs by a group of g inputs                                             128 + 16 g bytes

    | s z | s z | ... | s z |   scale and zero of outputs 0 to 31, bf16                   128
    |  0  |  1  | ... | 31  |   inputs 0 to 7 of each: 4 bytes  | 0 4 | 1 5 | 2 6 | 3 7 |  128
    |  0  |  1  | ... | 31  |   inputs 8 to 15                                            128
      ...                       the left of two is the low half of its byte

The signed bytes are activations, rounded to 8 bits too. 32 inputs of a row have a scale c:

    x = c * i                    i in -127 .. 127, c = max |x| / 127
    w = s * q                    int8, q in -127 .. 127, as in models/utils/quantize.py
    w = s * (q - 8) + z          int4, q in 0 .. 15
    sum of w x = c * (s * sum of (q - 8) i + z * sum of i)

So integers are multiplied, and for 32 weights there are three operations in fp32, or one where s can wait
for the end of the row. The integer sum begins at -8 * sum of i, in int8 at -128 * sum of i, the same for
every output, and no code needs a subtraction.

MXFP4 (gpt-oss) is an int4 whose 16 levels are not even. One instruction more, a look-up in a table of 16
bytes, makes of a code the number t = 2 w + 12, for w from -6 to 6; with z = -4 s, s * (t - 8) + z is 2 s w.
(As t is up to 24, AVX2 alone has to leave 16 bits after 8 inputs, not after 32.)

The price is the rounding of x: an error of 0.5% of the output's norm, where an output in bf16 alone has 0.2%,
8 bits a weight make 0.8% and 4 bits 7% (normally distributed numbers, groups of 32). The gain, for matrices
of 8192 x 2048, int4 in groups of 32, in huge pages (below), 24 of them in turn, in milliseconds, on 2 cores
of an AMD EPYC (Zen 5) as it is, and as if it had less (ZOO_CPU):

    rows of x                1     2     5     8      512
    int8  AVX-512          .38   .39   .49   .48     13.1
          AVX-VNNI         .36   .39   .47   .42     27.6
          AVX2             .42   .41   .57   .89     56.3
    int4  AVX-512          .24   .24   .27   .29     14.8      70 G weights/s with one row, of 5 bits each
          AVX-VNNI         .24   .25   .31   .44     27.5
          AVX2             .22   .24   .46   .69     44.4

With a row or two reading is the limit, whatever the instructions; this memory gives 40 to 60 GB/s. Five rows
cost 1.1 to 1.4 times as much as one, with AVX2 in int4 twice: with fewer instructions the core is busier than
the memory. Speculative sampling lives on that. 512 rows take less time than in fp32, so that a prompt needs
no second copy of the weights.
Experts are stacked as in row_linear.py.
Shapes: N outputs and K inputs of a layer, g weights in a group.
Proof: tests/test_tiled_linear.py.
"""

import ctypes
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.utils.kernels.cpp_library import load_library
from models.utils.quantize import (
    Int4Linear,
    Int8Linear,
    MXFP4Linear,
    add_bias,
    fixed,
    has_kernel,
    power_of_two,
    unpack,
)

SOURCE = Path(__file__).with_suffix(".cpp")
LANES = 32  # outputs of a tile
INPUTS = 32  # that share a scale of x
HUGE_PAGE = 2**21


# The layer --------------------------------------------------------------------------------------------------


class TiledLinear(nn.Module):
    """In the place of a quantized layer; rows in fp32 or bf16, as many as you like, on the CPU."""

    def __init__(self, tiles, num_outputs, bits, bias, floats=False):
        super().__init__()
        self.weight, self.num_outputs, self.bits, self.bias = fixed(tiles), num_outputs, bits, bias
        self.floats = floats  # 4 bits that are MXFP4's

    def forward(self, x):
        return add_bias(self.multiply(x, self.weight), self.bias)

    def multiply(self, x, tiles, experts=None):
        """x times the layer's own tiles, or times those of experts: (r,), as many of them for each row."""
        return torch.ops.zoo.tiled_linear(x, tiles, self.num_outputs, self.bits, False, experts, self.floats)


def tiles_of_int8(codes: Tensor, scale: Tensor) -> Tensor:
    """(N, K) codes and (N,), as quantize_int8 gives them -> (N / 32, 1, 128 + 32 K) bytes.

    Outputs are filled up to a multiple of 32. A row is one group; its scale becomes fp32 and keeps its value.
    """
    more = -len(codes) % LANES
    # With its sign's bit turned over, q in two's complement is q + 128 without a sign.
    unsigned = F.pad(codes.view(torch.uint8) ^ 128, (0, 0, 0, more))
    fours = unsigned.view(-1, LANES, codes.shape[1] // 4, 4).transpose(1, 2)
    scale = F.pad(scale.float(), (0, more)).view(-1, LANES).view(torch.uint8)
    return torch.cat([scale, fours.flatten(1)], dim=-1)[:, None]


def tiles_of_int4(packed: Tensor, scale_zero: Tensor) -> Tensor:
    """(N, K / 2) codes and (K / g, N, 2), as quantize_int4 gives them -> (N / 32, K / g, 128 + 16 g) bytes.

    Scales and zeros become bf16, whatever they were: the steps between 16 levels are so coarse that it adds
    less than a thousandth to their error.
    """
    num_groups, more = len(scale_zero), -len(packed) % LANES
    codes = F.pad(unpack(packed), (0, 0, 0, more)).view(
        -1, LANES, num_groups, packed.shape[1] // num_groups // 4, 2, 4
    )
    low, high = codes.unbind(-2)  # inputs 0 to 3 and 4 to 7 of every 8
    codes = (low | high << 4).permute(0, 2, 3, 1, 4).flatten(2)
    scale_zero = F.pad(scale_zero.bfloat16(), (0, 0, 0, more)).unflatten(1, (-1, LANES)).transpose(0, 1)
    return torch.cat([scale_zero.contiguous().view(torch.uint8).flatten(2), codes], dim=-1)


@torch.no_grad()
def tile_layers(model):
    """Give this kernel the quantized layers of a model on the CPU; None, or a line that says why it cannot.

    An int8 layer whose width is no multiple of 32 stays as it is.
    """
    layers = {name: layer for name, layer in model.named_modules() if fits(layer)}
    devices = {layer.weight.device.type for layer in layers.values()} - {"cpu"}
    if devices:
        return f"the kernel of quantized layers needs a model on the CPU, this one is on {devices.pop()}"
    if not layers:
        return None
    torch_has_one = any(has_kernel(scales_of(layer)) for layer in layers.values())
    reason = why_not_faster() if torch_has_one else load_kernel()
    if reason is None and any(getattr(layer, "tiled", False) for layer in layers.values()):
        reason = "their codes are in the order of torch's kernel; load the model with arranged=False"
    if reason is not None:
        return reason
    for name in list(layers):
        # Its codes are let go before the next one's turn.
        model.set_submodule(name, tiled(layers.pop(name)))
    return None


def tiles_of_mxfp4(packed: Tensor, scale: Tensor) -> Tensor:
    """(N, K / 2) codes and (N, K / 32) scales -> tiles as of int4 with g = 32.

    The kernel multiplies by 2 w + 4, so that s is half the scale and z is -4 s; both are exact in bf16.
    """
    half = power_of_two(scale.T) / 2
    return tiles_of_int4(packed, torch.stack([half, -4 * half], dim=-1))


@torch.no_grad()
def tile_mxfp4(model):
    """Give this kernel the layers in MXFP4, for which torch has none; without it they are dequantized."""
    layers = [name for name, layer in model.named_modules() if isinstance(layer, MXFP4Linear)]
    if layers and next(model.parameters()).device.type == "cpu" and load_kernel() is None:
        for name in layers:
            model.set_submodule(name, tiled(model.get_submodule(name)))


def fits(layer):
    in_int8 = isinstance(layer, Int8Linear) and layer.weight.shape[1] % INPUTS == 0
    return in_int8 or isinstance(layer, Int4Linear | MXFP4Linear)


def scales_of(layer):
    return layer.scale_zero if isinstance(layer, Int4Linear) else layer.scale


def tiled(layer):
    """The TiledLinear of a quantized layer."""
    if isinstance(layer, MXFP4Linear):
        tiles = tiles_of_mxfp4(layer.weight, layer.scale)
        return TiledLinear(tiles, len(layer.weight), 4, layer.bias, floats=True)
    if isinstance(layer, Int8Linear):
        return TiledLinear(tiles_of_int8(layer.weight, layer.scale), len(layer.weight), 8, layer.bias)
    return TiledLinear(tiles_of_int4(layer.weight, layer.scale_zero), layer.num_outputs, 4, layer.bias)


@torch.no_grad()
def into_huge_pages(model):
    """Put the parameters of a model on the CPU side by side into pages of 2 MB instead of 4 KB.

    A core remembers where some thousand pages lie; a matrix in pages of 4 KB has more, and prefetching stops
    at the end of each. The system gives large pages to whom asks before touching the memory.
    """
    parameters = list(model.parameters())
    size = sum(-(-p.nbytes // 64) * 64 for p in parameters)
    memory = torch.empty(size + 2 * HUGE_PAGE, dtype=torch.uint8)
    at = -memory.data_ptr() % HUGE_PAGE
    if sys.platform == "linux":
        advise = ctypes.CDLL(None).madvise
        advise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        # Advice that is not taken, by a kernel without such pages, changes nothing.
        advise(memory.data_ptr() + at, size // HUGE_PAGE * HUGE_PAGE + HUGE_PAGE, 14)  # MADV_HUGEPAGE
    for parameter in parameters:
        place = memory[at : at + parameter.nbytes].view(parameter.dtype).view(parameter.shape)
        parameter.data = place.copy_(parameter)
        at += -(-parameter.nbytes // 64) * 64


# The library ------------------------------------------------------------------------------------------------


def why_not_faster():
    """None, or a line that says why this kernel cannot be used or is slower than torch's own."""
    reason = load_kernel()
    if reason is None and not torch.ops.zoo.has_vector_loop():
        return "this CPU has neither AVX2 nor AVX-512 VNNI, and without them torch's own kernels are faster"
    return reason


def load_kernel():
    """Make torch.ops.zoo.tiled_linear known, built on first use; None, or why it cannot be used."""
    return load_library(SOURCE, shape_of)


def shape_of(x, tiles, num_outputs, bits, plain=False, experts=None, floats=False):
    rows = x.shape[:-1] if experts is None else experts.shape
    return x.new_empty(*rows, num_outputs)
