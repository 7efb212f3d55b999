"""Matrices in 8 or 4 bits a weight instead of 16 or 32: less to store, and less to read for every token.

Only the weights are quantized. Activations stay bf16 or fp32, and a layer gives what F.linear would give with
the weights that the codes stand for (dequantized). A weight becomes a small integer, its code q:

    int8, one scale for a row (an output):       w = scale * q                     q in -127 .. 127
    int4, scale and zero for a group of a row:   w = scale * (q - 8) + zero        q in 0 .. 15

A group of four in int4, from its smallest weight to its largest in 15 steps:

    weights -.6 .13 .3 .9  ->  scale .1, zero .2, codes 0 7 9 15  ->  -.6 .1 .3 .9

And one form that is not made here but kept as it was published (gpt-oss): 4-bit floats in groups of 32,

    mxfp4, an exponent for a group of a row:     w = 2 ** (scale - 127) * number[q]    q in 0 .. 15

whose numbers are 0 .5 1 1.5 2 3 4 6 and the same below zero. In 4 bits they are finer near 0, where most
weights are. It takes 4.25 bits a weight, int4 in groups of 32 takes 5.

A row of 4096 takes 8192 bytes in bf16, 4096 + 2 in int8, 2048 + 128 * 4 in int4 with groups of 32. A group
has a zero of its own because 16 levels are few: its smallest and largest weight are seldom opposites.

    load_model(folder, quantization=Quantization("int4", 32))  on loading: quantize_layers, one by one
    python convert_hf_checkpoint.py X --quantize int4          on disk: swap makes room for what is read back

Which layers: every module called Linear, torch's and transformer_lm's, unless its width is no multiple of 16
(torch's int8 kernel reads past the end of such rows). Where no group size fits a width, int4 becomes int8.
Embeddings stay as they are, and so does a head that is tied to them. A copy of it in int8 would be less to
read per token, but more to hold: tiny-llama-python-draft would be larger in int8 than it is in bf16.
(compile.py, which is after speed, makes one.) So does the router of a layer with experts: it is small, and
where it errs a token goes to others. Experts that share one tensor of three dimensions stay too.

Rounding to the nearest of 16 even levels between a group's ends (RTN) lets its two most extreme weights
choose the levels of all. search_int4 chooses them by the weights' squared error, which falls by 8% in
tiny-llama-python; in groups of 32 the logits come 3 to 10% closer, and two of three tiny models need fewer
bits per byte.
What counts is the error of the outputs, though, and it depends on the inputs. With a text (--calibrate FILE)
calibrated_int4 measures them and lets each weight make good what those before it spoiled: the logits come 25
to 45% closer than by RTN, and all three need fewer bits per byte. The whole model reads that text once first.
The kernels are torch's, in bf16 on the CPU; elsewhere a layer dequantizes its weights at every call.
Shapes: N outputs and K inputs of a layer, g weights in a group, b columns in a block of a text's products.
Proof: tests/test_quantize.py, against plain formulas and F.linear.
"""

import re
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from models.utils.calibration import input_products
from models.utils.command_line import QUANTIZED
from models.utils.errors import UserError, report
from models.utils.machine import give_back_freed, is_slow, spoken_bytes

GROUP_SIZES = (128, 64, 32)  # that torch's int4 kernel knows
CLIPPING = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
WEIGHTS_AT_ONCE = 2**17  # half a megabyte in fp32, which stays in a core's cache
MAX_KERNEL_ROWS = 8  # from here on torch multiplies faster by a matrix that it can read as bf16


@dataclass(frozen=True)
class Quantization:
    kind: str  # "int8" or "int4"
    group_size: int | None = None  # of int4: weights that share scale and zero; None in int8

    def __post_init__(self):
        if (self.kind, self.group_size) == ("mxfp4", 32):
            return  # that of published checkpoints, see MXFP4Linear: nothing is quantized to it here
        if self.kind not in QUANTIZED:
            raise UserError(f"quantization {self.kind!r} is not known; give one of: {', '.join(QUANTIZED)}")
        if self.kind == "int8" and self.group_size is not None:
            raise UserError("a group size goes with int4; int8 has one scale for a whole row")
        if self.kind == "int4" and self.group_size not in GROUP_SIZES:
            sizes = ", ".join(map(str, sorted(GROUP_SIZES)))
            raise UserError(f"int4 has no groups of {self.group_size!r}; give one of: {sizes}")

    def __str__(self):
        return self.kind if self.group_size is None else f"{self.kind} in groups of {self.group_size}"


def quantization_of(kind, group_size, calibrate=None):
    """The Quantization that --quantize and --group-size ask for, or None; --calibrate must suit it."""
    if calibrate is not None and kind != "int4":
        raise UserError("--calibrate goes with --quantize int4")
    if kind is None:
        if group_size is not None:
            raise UserError("--group-size goes with --quantize int4")
        return None
    if kind == "int4" and group_size is None:
        group_size = 32
    return Quantization(kind, group_size)


def stored_quantization(fields, where):
    """What a converted checkpoint's config.json says of its weights: a Quantization, or None."""
    stored = fields.get("quantization")
    if stored is None:
        return None
    if not isinstance(stored, dict) or set(stored) != {"kind", "group_size"}:
        raise UserError(f'{where}: "quantization" needs kind and group_size; convert the checkpoint again')
    try:
        return Quantization(**stored)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def published_quantization(hf_config):
    """The same of Hugging Face's config.json: MXFP4, whose codes are kept.

    FP8 becomes bf16 (conversion/fp8.py), and others conversion has refused.
    """
    stored = hf_config.get("quantization_config") or {}
    return Quantization("mxfp4", 32) if stored.get("quant_method") == "mxfp4" else None


# The arithmetic ---------------------------------------------------------------------------------------------


def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(codes (N, K) int8, scale (N,)): the largest weight of each row becomes 127 or -127."""
    rows = weight.float()
    # A row of zeros would divide by zero; any scale is right for it.
    largest = rows.abs().amax(dim=1).clamp_min(1e-12)
    # The scale is rounded to the dtype that it is kept in before the weights are divided by it: what that
    # rounding changes, the codes take into account.
    scale = (largest / 127).to(weight.dtype)
    codes = (rows / scale.float()[:, None]).round().clamp(-127, 127)
    return codes.to(torch.int8), scale


def dequantize_int8(codes: Tensor, scale: Tensor) -> Tensor:
    return codes.to(scale.dtype) * scale[:, None]


def round_int4(groups: Tensor, low: Tensor, high: Tensor, dtype) -> tuple[Tensor, Tensor, Tensor]:
    """(codes, scale, zero) with 16 levels from low to high; of shapes (..., g), (..., 1) and (..., 1)."""
    scale, zero = ends_of_levels(low, high, dtype)
    return nearest_codes(groups, scale, zero), scale, zero


def ends_of_levels(low, high, dtype):
    """(scale, zero) of 16 levels from low to high, which make 15 steps; zero is code 8, where q - 8 = 0."""
    scale = ((high - low) / 15).clamp_min(1e-12).to(dtype)
    return scale, (low + 8 * scale.float()).to(dtype)


def nearest_codes(groups, scale, zero):
    return ((groups - zero.float()) / scale.float() + 8).round().clamp(0, 15)


def rtn_int4(groups, dtype):
    """Round to nearest, the baseline: the ends of a group are the ends of its levels."""
    return round_int4(groups, groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True), dtype)


def search_int4(groups, dtype):
    """Of several clipped ranges, each improved by two line fits, the one with the least squared error.

    Clipping: rarer weights at the ends are represented worse, the many in the middle by finer levels. Line
    fit: with the codes given, w = scale * l + zero, l = q - 8, is a line through the points (l, w), and least
    squares gives its slope and its height. Then each weight takes its nearest code again.

    With g = w - mean(w) both need three sums of a group alone, which is why this takes seconds and no more:
        error = sum (scale l + z - g)^2 = scale^2 sum l^2 + 2 scale (z sum l - sum l g) + size z^2 + sum g^2
        slope = sum l g / (sum l^2 - (sum l)^2 / size)              where z = zero - mean(w)
    """
    size, mean = groups.shape[-1], groups.mean(-1, keepdim=True)
    centred = groups - mean
    spread_of_weights = centred.square().sum(-1, keepdim=True)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    best, least = None, None
    for ratio in CLIPPING:
        scale, zero = ends_of_levels(ratio * low, ratio * high, dtype)
        for _ in range(3):
            levels = torch.sub(groups, zero).div_(scale).round_().clamp_(-8, 7)
            total, product = levels.sum(-1, keepdim=True), (levels * centred).sum(-1, keepdim=True)
            squares = levels.square_().sum(-1, keepdim=True)
            z = zero.float() - mean
            error = scale.float() * (scale.float() * squares + 2 * (z * total - product))
            error += size * z * z + spread_of_weights
            # A thousandth of an error is less than these sums are rounded by.
            better = error < 0.999 * least if best else torch.ones_like(error, dtype=torch.bool)
            least = torch.where(better, error, least) if best else error
            best = [torch.where(better, *pair) for pair in zip((scale, zero), best or (scale, zero))]
            # Of a single level any slope is right.
            spread = squares - total * total / size
            scale = torch.where(spread > 0, product / spread, scale.float()).clamp_min(1e-12).to(dtype)
            zero = (mean - scale.float() * total / size).to(dtype)
    return nearest_codes(groups, *best), *best


def calibrated_int4(groups, dtype, shares):
    """search_int4, column by column: what rounding one weight spoils, those after it in its row make good.

    The outputs of a layer are sums, and its inputs move together. So an error e of weight j is partly undone
    by moving each later weight k by e * shares[j, k]; that one is rounded only when its turn comes. This is
    GPTQ (Frantar et al. 2023, eq. 2 and section 3.3), with scale and zero from the search for each group.

    shares: for each block of columns, see error_shares. The shapes are those of search_int4.
    """
    size, rows = groups.shape[-1], groups.flatten(1).clone()
    codes, scales, zeros = [], [], []
    for block, share in zip(rows.split([len(share) for share in shares], dim=1), shares):
        for j in range(len(share)):
            if j % size == 0:
                _, scale, zero = search_int4(block[:, j : j + size], dtype)
                scales.append(scale)
                zeros.append(zero)
            weight = block[:, j : j + 1]
            codes.append(nearest_codes(weight, scale, zero))
            error = (codes[-1] - 8) * scale.float() + zero.float() - weight
            block[:, j + 1 :] += error * share[j, j + 1 :]
    return torch.cat(codes, dim=1).view_as(groups), torch.stack(scales, dim=1), torch.stack(zeros, dim=1)


def error_shares(product):
    """(b, b) from X^T X (b, b): row j has what each later weight is moved by for an error of 1 in weight j.

    With weights 0 to j - 1 fixed and an error in weight j, least squares gives the best change of those after
    it, from the inverse of what is left of X^T X. Row j of the inverse's Cholesky factor has them for all j.
    A hundredth of the mean is added on the diagonal, as in the paper: the text is short, and says of an
    input that it never moves, or of two that they move alike, only that this was so here.
    """
    damping = 0.01 * product.diagonal().mean().clamp_min(1e-6)
    damped = product + damping * torch.eye(len(product), device=product.device)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    factor = torch.linalg.cholesky(inverse, upper=True)
    return factor / factor.diagonal()[:, None]


def quantize_int4(weight: Tensor, group_size: int, method=search_int4) -> tuple[Tensor, Tensor]:
    """(packed (N, K / 2) uint8, scale and zero (K / g, N, 2)), the latter as torch's kernels want them."""
    packed, scale_zero = [], []
    # A few rows at a time, since the search makes several copies in fp32; contiguous, whatever file they come
    # from, since the order in which numbers are summed changes the last bit.
    with one_thread():
        for rows in weight.split(max(1, WEIGHTS_AT_ONCE // weight.shape[1])):
            groups = rows.float().contiguous().view(len(rows), -1, group_size)
            codes, scale, zero = method(groups, weight.dtype)
            packed.append(pack(codes.view(rows.shape)))
            scale_zero.append(torch.cat([scale, zero], dim=-1).transpose(0, 1))
    return torch.cat(packed), torch.cat(scale_zero, dim=1)


@contextmanager
def one_thread():
    """Thousands of small steps go faster in one thread than in several that wait for each other at each."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def dequantize_int4(packed: Tensor, scale_zero: Tensor) -> Tensor:
    N, num_groups = len(packed), len(scale_zero)
    scale, zero = scale_zero.transpose(0, 1).split(1, dim=-1)  # each (N, K / g, 1)
    levels = unpack(packed).view(N, num_groups, -1).to(scale.dtype) - 8
    return (levels * scale + zero).view(N, -1)


# The numbers of a 4-bit float: a sign, 2 bits of exponent, 1 of mantissa.
FLOAT4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def dequantize_mxfp4(packed: Tensor, scale: Tensor, dtype) -> Tensor:
    """(N, K) from codes (N, K / 2) and scales (N, K / 32); exact in every dtype, see FLOAT4."""
    numbers = torch.tensor([*FLOAT4, *(-number for number in FLOAT4)], dtype=dtype, device=packed.device)
    byte = torch.arange(256, device=packed.device)
    pairs = torch.stack([numbers[byte & 15], numbers[byte >> 4]], dim=-1)
    weights = F.embedding(packed.int(), pairs).view(*scale.shape, 32)
    return weights.mul_(power_of_two(scale)[..., None].to(dtype)).flatten(1)


def power_of_two(scale: Tensor) -> Tensor:
    """What a scale of MXFP4, the exponent's bits of a number in fp32, stands for."""
    return torch.exp2(scale.float() - 127)


def pack(codes: Tensor) -> Tensor:
    """Two codes in a byte: an even column in the low half, the odd one after it in the high half."""
    codes = codes.to(torch.uint8)
    return codes[:, 0::2] | (codes[:, 1::2] << 4)


def unpack(packed: Tensor) -> Tensor:
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(1)


# The layers -------------------------------------------------------------------------------------------------


class Int8Linear(nn.Module):
    def __init__(self, linear, group_size=None):
        super().__init__()
        N, K = linear.weight.shape
        self.weight = fixed(linear.weight.new_empty(N, K, dtype=torch.int8))
        self.scale = fixed(linear.weight.new_empty(N))
        self.bias = getattr(linear, "bias", None)

    @staticmethod
    def quantized(weight, group_size=None, products=None):
        """The tensors that take the place of a weight, by their names; int8 needs no text."""
        codes, scale = quantize_int8(weight)
        return {"weight": codes, "scale": scale}

    def dequantized(self):
        return dequantize_int8(self.weight, self.scale)

    def prepare(self):
        """The kernel loads 16 codes at once, at a multiple of 16 bytes; in a file they begin anywhere."""
        if has_kernel(self.scale) and self.weight.data_ptr() % 16:
            self.weight = fixed(self.weight.clone())

    def forward(self, x):
        rows = x.reshape(-1, x.shape[-1])
        if not has_kernel(self.scale) or len(rows) > MAX_KERNEL_ROWS:
            return multiply(x, self.dequantized(), self.bias)
        out = torch._weight_int8pack_mm(rows, self.weight, self.scale)
        return add_bias(out.view(*x.shape[:-1], -1), self.bias)


class Int4Linear(nn.Module):
    def __init__(self, linear, group_size):
        super().__init__()
        N, K = linear.weight.shape
        self.num_outputs, self.group_size = N, group_size
        self.tiled = False
        self.weight = fixed(linear.weight.new_empty(N, K // 2, dtype=torch.uint8))
        self.scale_zero = fixed(linear.weight.new_empty(K // group_size, N, 2))
        self.bias = getattr(linear, "bias", None)

    @staticmethod
    def quantized(weight, group_size, products=None):
        """products: X^T X of its inputs, from calibration.py; None: there is no text to tell."""
        if products is None:
            packed, scale_zero = quantize_int4(weight, group_size)
        else:
            shares = [error_shares(product.to(weight.device)) for product in products]
            packed, scale_zero = quantize_int4(weight, group_size, partial(calibrated_int4, shares=shares))
        return {"weight": packed, "scale_zero": scale_zero}

    def dequantized(self):
        assert not self.tiled, "only the kernel knows where its tiles have which weight"
        return dequantize_int4(self.weight, self.scale_zero)

    def prepare(self):
        """Bring the codes into the order that this CPU's kernel wants, which differs from CPU to CPU.

        The kernel takes 16 rows at a time, so rows are added up to the next multiple, and not given back.
        """
        if self.tiled or not has_kernel(self.scale_zero):
            return
        more = -self.num_outputs % 16
        codes = F.pad(unpack(self.weight).int(), (0, 0, 0, more))
        self.weight = fixed(torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 2))
        self.scale_zero = fixed(F.pad(self.scale_zero, (0, 0, 0, more)))
        self.tiled = True

    def forward(self, x):
        if not self.tiled:
            return multiply(x, self.dequantized(), self.bias)
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        out = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, self.weight, self.group_size, self.scale_zero)
        return add_bias(out[:, : self.num_outputs].view(*x.shape[:-1], -1), self.bias)


class MXFP4Linear(nn.Module):
    """Weights as OpenAI published those of gpt-oss (`kind` of a Quantization: mxfp4); nothing is rounded."""

    def __init__(self, linear, group_size=32):
        super().__init__()
        N, K = linear.weight.shape
        self.weight = fixed(linear.weight.new_empty(N, K // 2, dtype=torch.uint8))
        self.scale = fixed(linear.weight.new_empty(N, K // 32, dtype=torch.uint8))
        self.bias = getattr(linear, "bias", None)

    def dequantized(self, dtype):
        return dequantize_mxfp4(self.weight, self.scale, dtype)

    def forward(self, x):
        return multiply(x, self.dequantized(x.dtype), self.bias)


def has_kernel(scale):
    """torch has kernels for other dtypes too, slower than dequantizing: in fp32 one row took 17 ms, not 3."""
    return scale.device.type == "cpu" and scale.dtype == torch.bfloat16


def multiply(x, weight, bias):
    """F.linear, in fp32 where this CPU is slow at the dtype."""
    if not is_slow(x.dtype, x.device):
        return F.linear(x, weight, bias)
    return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)


def fixed(tensor):
    """A parameter, which moves and is stored with the model, and is not trained."""
    return nn.Parameter(tensor, requires_grad=False)


def add_bias(out, bias):
    return out if bias is None else out + bias


# Whole models -----------------------------------------------------------------------------------------------


def plan_layers(model, quantization):
    """{name of a linear layer: (class, group size)} of all that are quantized, and a phrase for each other.

    It depends on names and shapes alone: the writer and the reader of a checkpoint compute the same plan.
    """
    if quantization.kind == "mxfp4":
        return dict.fromkeys(layers_in_blocks(model), (MXFP4Linear, 32)), []
    embeddings = {id(m.weight) for m in model.modules() if type(m).__name__ == "Embedding"}
    routers = [m.router for m in model.modules() if hasattr(m, "experts") and hasattr(m, "router")]
    plan, notes = {}, []
    for name, module in model.named_modules():
        if type(module).__name__ != "Linear":
            continue
        width = module.weight.shape[1]
        sizes = [g for g in GROUP_SIZES if g <= (quantization.group_size or 0) and width % g == 0]
        if id(module.weight) in embeddings:
            notes.append(f"{name} keeps its precision (it is the embedding's matrix)")
        elif any(module is router for router in routers):
            notes.append(f"{name} keeps its precision (it chooses experts)")
        elif width % 16:
            notes.append(f"{name} keeps its precision (its width {width} is no multiple of 16)")
        elif quantization.kind == "int8":
            plan[name] = (Int8Linear, None)
        elif not sizes:
            plan[name] = (Int8Linear, None)
            notes.append(f"{name} is int8 (no group divides its width {width})")
        else:
            plan[name] = (Int4Linear, sizes[0])
            if sizes[0] != quantization.group_size:
                notes.append(f"{name} has groups of {sizes[0]} (its width is {width})")
    for name, parameter in model.named_parameters():
        if parameter.dim() > 2:
            size = spoken_bytes(parameter.nbytes)
            notes.append(f"{name} keeps its precision (its {size} are no matrix of a linear layer)")
    return plan, notes


def layers_in_blocks(model):
    """The names of the linear layers of a model's experts, which are what MXFP4 is published for."""
    layers = {n: m for n, m in model.named_modules() if type(m).__name__ == "Linear" and ".experts." in n}
    for name, layer in layers.items():
        if layer.weight.shape[1] % 32:
            raise UserError(
                f"{name} has {layer.weight.shape[1]} inputs, which are no whole blocks of MXFP4, 32"
            )
    return list(layers)


def swap(model, quantization):
    """Put empty quantized layers in the place of a model's linear ones, on their device (meta)."""
    plan, notes = plan_layers(model, quantization)
    for name, (layer_class, group_size) in plan.items():
        model.set_submodule(name, layer_class(model.get_submodule(name), group_size))
    return notes


@torch.no_grad()
def quantize_layers(model, quantization, device="cpu", dtype=None, windows=(), after=lambda weight: None):
    """Quantize the linear layers of a model that has its weights; one after the other, each in dtype first.

    Weights that are mapped from a file come into memory a layer at a time, and leave it quantized.
    windows: of a calibration text, for int4; the whole model reads them once before, where its weights are.
    after: called with each weight that has been quantized.
    """
    plan, notes = plan_layers(model, quantization)
    products = calibrate(model, plan, windows)
    started, told = time.monotonic(), sys.stderr.isatty()  # where a bar is shown
    for done, name in enumerate(tqdm(plan, "quantizing", leave=False, disable=None)):
        if done and not told and (seconds := time.monotonic() - started) > 1:
            report(f"quantizing {len(plan)} layers, which takes about {seconds / done * len(plan):.0f} s")
            told = True
        layer = model.get_submodule(name)
        model.set_submodule(name, quantize_layer(layer, *plan[name], device, dtype, products.pop(name, None)))
        after(layer.weight)
    return notes


def quantize_layer(linear, layer_class, group_size=None, device="cpu", dtype=None, products=None):
    """The layer of this class that takes the place of a linear one."""
    weight = linear.weight.detach().to(device=device, dtype=dtype)
    with torch.device("meta"):
        layer = layer_class(linear, group_size)
    for part, tensor in layer_class.quantized(weight, group_size, products).items():
        setattr(layer, part, fixed(tensor))
    return layer.to(device=device, dtype=dtype)


def calibrate(model, plan, windows):
    """{name: X^T X} of the layers of a plan that are int4, from what the model does with a text."""
    names = [name for name in plan if plan[name][0] is Int4Linear]
    products = input_products(model.eval(), names, windows)
    if windows and (unread := [name for name in names if name not in products]):
        which = f"{len(unread)} of {len(names)} layers, as {unread[0]}"
        report(f"--calibrate: the text has nothing for {which}; they are quantized without it")
    return products


def parts_of(plan, name, shape, dtype):
    """{name: (shape, dtype)} of what is stored for the weight called `name`; of another tensor, itself."""
    layer, _, part = name.rpartition(".")
    if part != "weight" or layer not in plan:
        return {name: (shape, dtype)}
    layer_class, group_size = plan[layer]
    with torch.device("meta"):
        empty = layer_class(nn.Linear(shape[1], shape[0], bias=False, dtype=dtype), group_size)
    return {f"{layer}.{part}": (tuple(t.shape), t.dtype) for part, t in empty.named_parameters()}


def quantized_parts(plan, name, tensor, products):
    """{name: tensor} of what is stored for the tensor called `name`, in the order of parts_of.

    products: what calibrate found, or {}; a layer's are let go with it.
    """
    layer, _, part = name.rpartition(".")
    if part != "weight" or layer not in plan:
        return {name: tensor}
    layer_class, group_size = plan[layer]
    parts = layer_class.quantized(tensor, group_size, products.pop(layer, None))
    return {f"{layer}.{part}": new for part, new in parts.items()}


def prepare(model):
    """Bring all quantized layers into the form that the kernels of their device want."""
    for module in model.modules():
        if isinstance(module, (Int8Linear, Int4Linear)):
            module.prepare()
            give_back_freed()  # codes of 32 bits each, on the way to the kernel's order


def spoken(quantization, notes):
    """What was done, for a person; layers of a stack that differ by their number alone are named once."""
    folded = dict.fromkeys(re.sub(r"\.\d+\.", ".{n}.", note) for note in notes)
    return "; ".join([f"linear layers in {quantization}", *folded])
