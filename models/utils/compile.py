"""Decoding at the speed of memory: one step of a model compiled, with products for a few rows.

    model = compile_decoding(load_model(folder, dtype=torch.bfloat16))
    for tokens in generate(model, prompts, ...):      as before, 1.6 to 4 times as fast

A decoded token multiplies one row by every matrix of the model. Each weight is read from memory, used for one
multiplication, and not needed again until the next token: memory is all that counts. Two things are in the
way of its speed when the model runs as it is written. torch's matrix products are made for many rows; with
one they read a third to a half of what the memory could deliver. And the small operations between the
matrices (norms, rotations, additions) each take their time to start, and each write a result that the next
one reads again.

Both are mended, and the model files stay as they are. torch.export traces the step to a graph of tensor
operations, in which FewRows puts other formulas for products and attention: those of row_linear.py for fp32
and bf16, of tiled_linear.py for quantized layers, of row_attention.py. Inductor, the compiler behind
torch.compile, makes loops of what is between them, several operations in each, and translates them with the
C++ compiler. Shapes are fixed (tokens, and slots of the cache), so nothing is decided at run time. What comes
out is kept in CACHE_FOLDER; the next start loads it instead of compiling.

Everything but a step (prefill, batches of a size not seen before, training) runs as it is written.
Proof: tests/test_compile.py, against the model itself.
"""

import contextlib
import functools
import hashlib
import inspect
import os
import sys
import tempfile
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from models.utils.files import one_line
from models.utils.kernels.row_attention import MAX_QUERIES, attention_fits, load_row_attention, row_attention
from models.utils.kernels.row_linear import linear_fits, load_row_linear, row_linear
from models.utils.kernels.tiled_linear import into_huge_pages, tile_layers
from models.utils.quantize import Int4Linear, Int8Linear, Quantization, quantize_layers

CACHE_FOLDER = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "annotated-model-zoo"
MIN_SLOTS = 256


# Few rows ---------------------------------------------------------------------------------------------------


def row_times_matrix(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear for a single row: multiply and sum, in fp32. weight is (N, K), x holds K numbers.

    For what row_linear does not take: a GPU, or a K that is no multiple of 32. Inductor makes of each block
    one loop over its rows, with no matrix of products in between. A loop waits for each of its additions
    before it begins the next; four blocks are four sums that grow side by side.
    """
    row = x.reshape(-1).float()
    blocks = weight.chunk(4)
    out = torch.cat([(block.float() * row).sum(dim=-1) for block in blocks])
    if bias is not None:
        out = out + bias
    return out.type_as(x).view(*x.shape[:-1], -1)


def row_times_int8(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """torch._weight_int8pack_mm for a single row: the scale of an output is applied once, to its sum."""
    row = x.reshape(-1).float()
    out = torch.cat([(block.float() * row).sum(dim=-1) for block in codes.chunk(2)])
    return (out * scale).type_as(x)[None]


def attend(q, k, v, mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """scaled_dot_product_attention for a few queries per head: row_attention, or else multiply and sum again.

    q (B, H, T, d), k and v (B, K, S, d), mask (B, 1, T, S); the H / K heads of a group read one k and v.
    """
    if attention_fits(q, k, mask):
        return row_attention(q, k, v, mask, scale)
    B, H, T, d = q.shape
    K, S = k.shape[1:3]
    q = q.reshape(B, K, H // K, T, 1, d).float() * (d**-0.5 if scale is None else scale)
    scores = (q * k[:, :, None, None].float()).sum(dim=-1)  # (B, K, H / K, T, S)
    if mask is not None:
        scores = scores.masked_fill(~mask.view(-1, 1, 1, T, S), -torch.inf)
    probs = scores.softmax(dim=-1)
    out = (probs[..., None] * v[:, :, None, None].float()).sum(dim=-2)  # (B, K, H / K, T, d)
    return out.type_as(v).view(B, H, T, d)


class FewRows(TorchFunctionMode):
    """While a step is traced: products of a few rows, and attention of a few queries, are other formulas."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.einsum and args[0] == "...i,oi->...o":  # transformer_lm's own Linear
            function, args = F.linear, args[1:]
        if function is F.linear and linear_fits(*args[:2]):
            return row_linear(*args, **kwargs)
        if function is F.linear and args[0].numel() == args[0].shape[-1]:
            return row_times_matrix(*args, **kwargs)
        if function is torch._weight_int8pack_mm and len(args[0]) == 1:
            return row_times_int8(*args, **kwargs)
        if function is F.scaled_dot_product_attention and args[0].shape[2] <= MAX_QUERIES:
            return attend(*args, **kwargs)
        return function(*args, **kwargs)


# The step ---------------------------------------------------------------------------------------------------


class Step(nn.Module):
    """A call of the model for a few tokens per row, as torch.export wants it: tensors in, tensors out."""

    def __init__(self, model, layer_cache):
        super().__init__()
        self.model, self.layer_cache = model, layer_cache

    def forward(self, tokens: Tensor, positions: Tensor, cache: list[Tensor]) -> Tensor:
        pairs = zip(cache[0::2], cache[1::2])
        with FewRows():
            return self.model(tokens, positions, tuple(self.layer_cache(k, v) for k, v in pairs))


def compile_decoding(model, widths=(1,), report=print):
    """A model that is called like this one, and faster with `widths` tokens per row behind what is cached.

    One token is a step of decoding; speculative sampling verifies several. `report` is told, in a line, what
    cannot be done; that runs as before. The weights move to where a step reads them fastest.
    """
    if next(model.parameters()).device.type == "cpu":
        arrange(model, report)
    return CompiledDecoder(model, widths, report)


def arrange(model, report):
    """Layers and weights of a model on the CPU in the form that a step reads fastest."""
    if any(isinstance(module, (Int8Linear, Int4Linear)) for module in model.modules()):
        untie_head(model)
        reason = tile_layers(model)
        if reason:
            report(f"quantized layers with torch's own kernels: {reason}")
    reason = load_row_linear() or load_row_attention()
    if reason:
        report(f"products and attention of a few rows as the compiler makes them: {reason}")
    # Small matrices lie in columns (onednn.py); a step reads rows.
    for parameter in model.parameters():
        parameter.data = parameter.data.contiguous()
    into_huge_pages(model)


@torch.no_grad()
def untie_head(model):
    """Where lm_head is the embedding's matrix, and so was not quantized, make it a copy in int8.

    A step reads a row of the embedding, but all of the head. In bf16 that is half of what a step of GPT-2
    small reads in int8, more in int4; the copy adds half of the matrix to what the model holds.
    """
    if model.lm_head.weight is model.token_embed.weight:
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach())
        quantize_layers(model, Quantization("int8"))  # the head is all that is left


class CompiledDecoder:
    """A decoder whose steps are compiled, for each size of batch and cache that is asked for.

    It is called like the model, and hands on to the model what is not such a step.
    """

    def __init__(self, model, widths, report):
        self.model, self.widths, self.report = model, sorted(widths), report
        self.steps = {}

    def __getattr__(self, name):
        return getattr(self.model, name)

    def new_cache(self, batch_size, num_slots):
        """The model's cache, with more slots than asked for, and the steps that go with it.

        Slots are a power of two, so that few sizes ever need compiling; a step looks at all of them, written
        or not. The widest step fits behind the last slot that the caller knows of.
        """
        num_slots = max(MIN_SLOTS, 1 << (num_slots + self.widths[-1] - 2).bit_length())
        cache = self.model.new_cache(batch_size, num_slots)
        for width in self.widths:
            if (batch_size, num_slots, width) not in self.steps:
                self.steps[batch_size, num_slots, width] = self.compiled(cache, width)
        return cache

    def __call__(self, tokens, positions=None, cache=None):
        step, pads = None, 0
        if positions is not None and tokens.shape[1] <= self.widths[-1]:
            width = next(wider for wider in self.widths if wider >= tokens.shape[1])
            step, pads = self.steps.get((len(tokens), cache[0].k.shape[2], width)), width - tokens.shape[1]
        # Behind the model's context there are no positions, and so no place for pads.
        if step is None or pads and positions.max() + pads >= self.model.config.max_seq_len:
            return self.model(tokens, positions, cache)
        slots = [tensor for layer in cache for tensor in layer]
        if not pads:
            return step(tokens, positions, slots)
        # Pads stand behind the last token, which does not see them, in slots that are written again.
        last = positions[:, -1:] + torch.arange(1, pads + 1, device=positions.device)
        padded, places = F.pad(tokens, (0, pads)), torch.cat([positions, last], dim=1)
        return step(padded, places, slots)[:, : tokens.shape[1]]

    def compiled(self, cache, width):
        """The step, from the disk or compiled now; None, and a line that says why, where that fails."""
        if any(isinstance(module, Int4Linear) for module in self.model.modules()):
            self.report("going on without compilation: torch's own int4 kernel cannot be part of a step")
            return None
        try:
            if cache[0].k.device.type == "cuda":
                return graph_step(self.model, cache)
            path = cache_folder(self.report) / f"{fingerprint(self.model, cache, width)}.pt2"
            if not path.is_file():
                self.report("compiling a step (about a minute; the next start finds it ready)")
                compile_step(self.model, cache, width, path)
            return load_step(self.model, path)
        except Exception as error:
            self.report(f"going on without compilation: {one_line(error)[:200]}")
            return None


def compile_step(model, cache, width, path):
    """Trace a step of the model, and translate it into a library at `path`; the weights stay outside."""
    tokens = torch.zeros(cache[0].k.shape[0], width, dtype=torch.long)
    inputs = (tokens, tokens.clone(), [tensor for layer in cache for tensor in layer])
    # Made in a folder of its own and then moved: who is interrupted leaves nothing half done.
    with quiet(), torch.no_grad(), tempfile.TemporaryDirectory(dir=path.parent) as folder:
        graph = torch.export.export(Step(model, type(cache[0])), inputs)
        library = torch._inductor.aoti_compile_and_package(
            graph,
            package_path=f"{folder}/step.pt2",
            # All tensors come from the model when the library is loaded, the smallest too.
            inductor_configs={
                "aot_inductor.package_constants_in_so": False,
                "always_keep_tensor_constants": True,
            },
        )
        os.replace(library, path)


def load_step(model, path):
    """The compiled step, reading the model's own weights."""
    step = torch._inductor.aoti_load_package(str(path), run_single_threaded=True)
    tensors = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    names = {name: name.removeprefix("model.") for name in step.get_constant_fqns()}
    step.load_constants(
        {name: tensors[ours].detach() for name, ours in names.items()},
        check_full_update=True,
        user_managed=True,
    )
    return step


def graph_step(model, cache):
    """On a GPU: torch.compile, which records the step as a CUDA graph and then replays it."""
    for tensor in (tensor for layer in cache for tensor in layer):
        torch._dynamo.mark_static_address(tensor)
    step = Step(model, type(cache[0]))
    step = torch.compile(step, fullgraph=True, dynamic=False, mode="reduce-overhead")
    return lambda *inputs: step(*inputs).clone()  # the next replay writes over what this one returned


def cache_folder(report):
    """CACHE_FOLDER, or where that cannot be written one that this process throws away."""
    try:
        CACHE_FOLDER.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=CACHE_FOLDER).close()
        return CACHE_FOLDER
    except OSError as error:
        report(f"{CACHE_FOLDER}: {error.strerror}; what is compiled cannot be kept for the next start")
        return Path(temporary_folder().name)


@functools.cache
def temporary_folder():
    return tempfile.TemporaryDirectory()


@contextlib.contextmanager
def quiet():
    """The compiler talks to its developers; none of it is for who waits for a text."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def fingerprint(model, cache, width):
    """What the compiled step depends on, as a short word: a step of anything else has another file."""
    parameters = [(name, tuple(p.shape), p.dtype) for name, p in model.named_parameters()]
    facts = [
        torch.__version__,
        torch.backends.cpu.get_cpu_capability(),
        torch.get_num_threads(),
        load_row_linear(),
        load_row_attention(),
        tuple(cache[0].k.shape),
        width,
        model.config,
        [(name, type(module).__name__) for name, module in model.named_modules()],
        parameters,
        inspect.getsource(sys.modules[type(model).__module__]),
        Path(__file__).read_text(encoding="utf-8"),
    ]
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:24]
