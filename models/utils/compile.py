"""Decoding at the speed of memory: one step of a model compiled, with products for a few rows.

    model = compile_decoding(load_model(folder, dtype=torch.bfloat16, arranged=False))
    for tokens in generate(model, prompts, ...):      as before, and faster

(1.6 to 4 times as fast for a Llama of 124 M, 5 to 9 times for tiny-llama-python, which fits into the caches.)

A decoded token multiplies one row by every matrix of the model. Each weight is read from memory, used for one
multiplication, and not needed again until the next token: memory is all that counts. Two things are in the
way of its speed when the model runs as it is written. torch's matrix products are made for many rows; with
one they read a third to a half of what the memory could deliver. And the small operations between the
matrices (norms, rotations, additions) each take their time to start, and each write a result that the next
one reads again.

Both are mended, and the model files stay as they are. torch.export traces the step to a graph of tensor
operations, in which FewRows puts other formulas for products and attention: those of row_linear.py for fp32
and bf16, of row_attention.py. Quantized layers were replaced before, by those of tiled_linear.py. Inductor,
the compiler behind torch.compile, makes loops of what is between them, several operations in each, and
translates them with the C++ compiler. Shapes are fixed (tokens, and slots of the cache), so nothing is
decided at run time; a cache may say which of its sizes are not (free_sizes: runs_serve/paged_cache.py). What
comes out is kept in CACHE_FOLDER; the next start loads it instead of compiling.

Everything but a step (prefill, batches of a size not seen before, training) runs as it is written, but for
the quantized layers, which are the same ones.
Shapes: B batch, T tokens in this call, S slots, V vocabulary; of attention H heads, K of keys and values,
    d features of each; of a product N outputs, n inputs.
Proof: tests/test_compile.py, against the model itself.
"""

import contextlib
import functools
import hashlib
import inspect
import io
import logging
import os
import sys
import tempfile
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from models.utils import head, stacked_experts
from models.utils.files import one_line
from models.utils.head import Head
from models.utils.kernels.cpp_library import libraries
from models.utils.kernels.onednn import choose_products
from models.utils.kernels.row_attention import MAX_QUERIES, attention_fits, load_row_attention, row_attention
from models.utils.kernels.row_linear import linear_fits, load_row_linear, row_linear
from models.utils.kernels.tiled_linear import TiledLinear, into_huge_pages, tile_layers
from models.utils.machine import instructions
from models.utils.quantize import Int4Linear, Int8Linear, MXFP4Linear, prepare, quantize_layer
from models.utils.stacked_experts import stack_experts, without_single_experts

CACHE_FOLDER = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "annotated-model-zoo"
MIN_SLOTS = 256


# Few rows ---------------------------------------------------------------------------------------------------


def row_times_matrix(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear for a single row: multiply and sum, in fp32. weight is (N, n), x holds n numbers.

    For what row_linear does not take: a GPU, or an n that is no multiple of 32. Inductor makes of each block
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
        if function is torch._weight_int8pack_mm and args[0].shape[0] == 1:
            return row_times_int8(*args, **kwargs)
        # `types` are those that answer for themselves, as keys and values that lie in blocks.
        is_attention = function is F.scaled_dot_product_attention and not types
        if is_attention and args[0].shape[2] <= MAX_QUERIES:
            return attend(*args, **kwargs)
        return function(*args, **kwargs)


# The step ---------------------------------------------------------------------------------------------------


class Step(nn.Module):
    """A call of the model for a few tokens per row, as torch.export wants it: tensors in, tensors out.

    A cache is whatever a page makes of it: tuples, named or not, of tensors, as deep as they are nested.
    """

    def __init__(self, model, cache):
        super().__init__()
        self.model = model
        self.form = pytree.tree_map(lambda leaf: isinstance(leaf, Tensor) or leaf, cache)

    def forward(self, tokens: Tensor, positions: Tensor, cache: list[Tensor]) -> Tensor:
        tensors = iter(cache)
        cache = pytree.tree_map(lambda leaf: next(tensors) if leaf is True else leaf, self.form)
        with FewRows():
            return logits(self.model.lm_head, self.model.hidden(tokens, positions, cache))


def logits(lm_head, hidden):
    """(B, T, V) in fp32, whatever the weights' dtype, as of a loaded model (head.py)."""
    if isinstance(lm_head, TiledLinear):
        return lm_head(hidden.float())
    if isinstance(lm_head, Head) and linear_fits(hidden, lm_head.weight):
        return row_linear(hidden, lm_head.weight, lm_head.bias, to_fp32=True)
    return lm_head(hidden)


def tensors_of(cache):
    """The tensors of a cache, in their order; TypeError for one that holds anything else, as a number."""
    leaves = [leaf for leaf in pytree.tree_leaves(cache) if leaf is not None]
    for leaf in leaves:
        if not isinstance(leaf, Tensor):
            raise TypeError(f"a step takes tensors alone, and this cache holds {type(leaf).__name__} too")
    return leaves


def compile_decoding(model, widths=(1,), report=print):
    """A model that is called like this one, and faster with `widths` tokens per row behind what is cached.

    One token is a step of decoding; speculative sampling verifies several. `report` is told, in a line, what
    cannot be done; that runs as before. The weights move to where a step reads them fastest.
    """
    if next(model.parameters()).device.type == "cpu":
        arrange(model, report)
    stack_experts(model, report)
    return CompiledDecoder(model, widths, report)


def arrange(model, report):
    """Layers and weights of a model on the CPU in the form that a step reads fastest."""
    if any(isinstance(module, (Int8Linear, Int4Linear, MXFP4Linear)) for module in model.modules()):
        untie_head(model)
        reason = tile_layers(model)
        if reason:
            report(f"quantized layers with torch's own kernels: {reason}")
            prepare(model)
    reason = load_row_linear() or load_row_attention()
    if reason:
        report(f"products and attention of a few rows as the compiler makes them: {reason}")
    # A step reads rows; a prompt, which runs as it is written, has its library chosen as everywhere.
    choose_products(model, by_columns=False)
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
        model.lm_head = quantize_layer(model.lm_head, Int8Linear)


class CompiledDecoder:
    """A decoder whose steps are compiled, for each size of batch and cache that is asked for.

    It is called like the model, and hands on to the model what is not such a step.
    """

    def __init__(self, model, widths, report):
        self.model, self.widths, self.report = model, sorted(widths), report
        self.steps = {}
        self.takes_pads = None if self.widths[-1] > 1 else False
        # One that forgets (a state, a window) takes them anywhere: at position -1, where they do nothing.
        self.names_pads = "num_undo" in inspect.signature(model.new_cache).parameters

    def __getattr__(self, name):
        return getattr(self.model, name)

    def new_cache(self, batch_size, num_slots, **options):
        """The model's cache, with more slots than asked for, and the steps that go with it.

        Slots are a power of two, so that few sizes ever need compiling; a step looks at all of them, written
        or not. The widest step fits behind the last slot that the caller knows of.
        """
        num_slots = max(MIN_SLOTS, 1 << (num_slots + self.widths[-1] - 2).bit_length())
        cache = self.model.new_cache(batch_size, num_slots, **options)
        self.prepare(cache)
        if self.takes_pads is None:
            self.takes_pads = has_a_slot_for_each_position(self.model, num_slots)
        return cache

    def prepare(self, cache):
        """Make the steps for a cache of this form, if there are none yet."""
        for width in self.widths:
            if (form := (width, *shapes_of(cache))) not in self.steps:
                self.steps[form] = self.compiled(cache, width)

    def __call__(self, tokens, positions=None, cache=None):
        step, pads = None, 0
        if positions is not None and tokens.shape[1] <= self.widths[-1]:
            width = next(wider for wider in self.widths if wider >= tokens.shape[1])
            step, pads = self.steps.get((width, *shapes_of(cache))), width - tokens.shape[1]
        if pads and not self.names_pads:
            # Behind the model's context there are no positions, and so no place for pads.
            has_place = self.takes_pads and positions.max() + pads < self.model.config.max_seq_len
            step = step if has_place else None
        if step is None:
            return self.model(tokens, positions, cache)
        if not pads:
            return step(tokens, positions, tensors_of(cache))
        # Pads stand behind the last token, which does not see them, in slots that are written again.
        last = positions[:, -1:] + torch.arange(1, pads + 1, device=positions.device)
        last = last.fill_(-1) if self.names_pads else last
        padded, places = F.pad(tokens, (0, pads)), torch.cat([positions, last], dim=1)
        return step(padded, places, tensors_of(cache))[:, : tokens.shape[1]]

    def compiled(self, cache, width):
        """The step, from the disk or compiled now; None, and a line that says why, where that fails."""
        if any(isinstance(module, Int4Linear) for module in self.model.modules()):
            self.report("going on without compilation: torch's own int4 kernel cannot be part of a step")
            return None
        try:
            if tensors_of(cache)[0].is_cuda:
                return graph_step(self.model, cache)
            path = cache_folder(self.report) / f"{fingerprint(self.model, cache, width)}.pt2"
            if not path.is_file():
                self.report("compiling a step (about a minute; the next start finds it ready)")
                compile_step(self.model, cache, width, path)
            return load_step(self.model, path)
        except Exception as error:
            self.report(f"going on without compilation: {one_line(error)[:200]}")
            return None


def shapes_of(cache):
    """Of each tensor of a cache its shape, with a letter in the place of a size that is free."""
    tensors = [leaf for leaf in pytree.tree_leaves(cache) if isinstance(leaf, Tensor)]
    return [
        tuple(free.get(n, size) for n, size in enumerate(tensor.shape))
        for tensor, free in zip(tensors, free_sizes(cache, tensors))
    ]


def free_sizes(cache, tensors):
    """For each of its tensors {dimension: letter} of the sizes, each at least 2, that a step leaves open."""
    return cache.free_sizes() if hasattr(cache, "free_sizes") else [{} for _ in tensors]


def rows_of(free):
    """The same for tokens and positions, which have as many rows as a cache's first tensor."""
    return {0: free[0][0]} if 0 in free[0] else {}


def has_a_slot_for_each_position(model, num_slots):
    """Whether all of a cache grows with its slots; a window or a state does not, and is spoilt by pads."""
    shapes = [shapes_of(model.new_cache(1, num_slots + more)) for more in (0, 1)]
    return all(one != other for one, other in zip(*shapes))


def compile_step(model, cache, width, path):
    """Trace a step of the model, and translate it into a library at `path`; the weights stay outside."""
    tensors = tensors_of(cache)
    tokens = torch.zeros(tensors[0].shape[0], width, dtype=torch.long)
    inputs = (tokens, tokens.clone(), tensors)
    free = free_sizes(cache, tensors)
    rows = rows_of(free)
    sizes = pytree.tree_map_only(str, lambda _: torch.export.Dim.DYNAMIC, (rows, rows, free))
    # Made in a folder of its own and then moved: who is interrupted leaves nothing half done.
    with quiet(), torch.no_grad(), tempfile.TemporaryDirectory(dir=path.parent) as folder:
        with without_single_experts(model):
            graph = torch.export.export(Step(model, cache), inputs, dynamic_shapes=sizes)
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
    """On a GPU: torch.compile, which records the step as a CUDA graph and then replays it.

    Where sizes are free it is compiled once, and recorded for each of the sizes that occur.
    """
    tensors = tensors_of(cache)
    free = free_sizes(cache, tensors)
    for tensor in cache.lasting() if hasattr(cache, "lasting") else tensors:
        torch._dynamo.mark_static_address(tensor)
    dynamic = None if any(free) else False
    step = torch.compile(Step(model, cache), fullgraph=True, dynamic=dynamic, mode="reduce-overhead")

    def run(tokens, positions, tensors):
        for tensor, sizes in zip((tokens, positions, *tensors), (rows_of(free), rows_of(free), *free)):
            for dimension in sizes:
                torch._dynamo.mark_dynamic(tensor, dimension)
        return step(tokens, positions, tensors).clone()  # the next replay writes over what this one returned

    return run


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
    """Hide what is for the compiler's developers: warnings, and the graph printed on the way to an error."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def fingerprint(model, cache, width):
    """What the compiled step depends on, as a short word: a step of anything else has another file."""
    parameters = [(name, tuple(p.shape), p.dtype) for name, p in model.named_parameters()]
    facts = [
        torch.__version__,
        torch.backends.cpu.get_cpu_capability(),
        torch.get_num_threads(),
        load_row_linear(),
        load_row_attention(),
        libraries(),
        instructions(),
        shapes_of(cache),
        width,
        model.config,
        [(name, type(module).__name__) for name, module in model.named_modules()],
        parameters,
        inspect.getsource(sys.modules[type(model).__module__]),
        # A cache that is more than tensors is traced too.
        inspect.getsource(sys.modules[type(cache).__module__]) if hasattr(cache, "free_sizes") else "",
        *(
            Path(page).read_text(encoding="utf-8")
            for page in (__file__, head.__file__, stacked_experts.__file__)
        ),
    ]
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:24]
