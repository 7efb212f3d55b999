"""A model's calls, recorded: every operation with its module, its shape and its lines of source.

The model stands on the meta device, so that its size costs nothing; of equal layers and experts one is kept
(folding.py); and torch.export runs it once. What comes out is a list of Op, in the order in which they run.
"""

import inspect
import re
import warnings
from contextlib import redirect_stderr
from dataclasses import dataclass, field
from io import StringIO
from typing import NamedTuple

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from models.utils.errors import UserError
from structure.capture.folding import Folds, Loop, fold_experts, fold_layers, fold_time, unfold
from structure.capture.masks import masks_of
from structure.capture.sizes import Sizes, evaluate
from structure.capture.source import page_of_class


class Frame(NamedTuple):
    """A line of the model's file that was running, and the class and function around it."""

    line: int
    cls: str | None
    function: str


@dataclass(eq=False)
class Op:
    name: str  # in the graph
    target: str  # "linear", "matmul", "scaled_dot_product_attention", "input", "parameter"
    shape: tuple  # of what it makes; of several tensors the first one's
    arguments: list = field(default_factory=list)  # the ops whose tensors it reads, in order
    modules: tuple = ()  # (path, key) of the modules whose forward is running, outermost first
    frames: tuple = ()  # of the model's file, outermost first
    path: str = ""  # of a parameter or an input: its name
    written: "Op | None" = None  # of what writes in place: the op that made what it writes into
    whole: bool = False  # whether it makes whole numbers: positions, say
    loop: Loop | None = None  # the loop over time that it is in; of its T rounds one remains


@dataclass
class Trace:
    model: nn.Module  # with one of each run of equal layers
    folds: Folds  # what its layers and experts stand for
    sizes: Sizes
    known: dict  # what the letters of shape comments are, where the config says it
    ops: list
    masks: dict  # lines of the page: what the mask that they make says, see masks.py


def trace(model):
    """Run a model of the meta device once, as it runs when it writes: with a cache where it has one.

    Changes the model: of equal layers one remains.
    """
    page = page_of_class(type(model))
    sizes = Sizes(model.config, [n for parameter in model.parameters() for n in parameter.shape])
    known = {
        letter: getattr(model.config, name)
        for name, letter in page.letters().items()
        if type(getattr(model.config, name)) is int
    }
    cache = cache_of(model, sizes)
    folds = fold_layers(model)
    kept = folds.kept_of(cache)

    def count(num_tokens):
        """How many operations run for so many tokens; None where the meta device is not enough."""
        few = {letter: sizes[letter] for letter in "BSN"} | {"T": num_tokens}
        return count_operations(*call_of(model, page, few, known, kept))

    experts = fold_experts(model, folds)
    if experts and count(2) is None:
        # A model that asks for an expert by its number cannot do with one of them.
        unfold(experts, folds)
        if count(2) is None:
            fold_experts(model, folds)
    # The record of a loop over time is as long as the text, that of a window takes long texts in pieces; what
    # cannot be counted may be such a loop.
    if count(2) is None or not count(2) == count(3) == count(sizes["T"]):
        sizes.taken |= {n for tensor in tree_leaves(cache) if hasattr(tensor, "shape") for n in tensor.shape}
        sizes.few_tokens()
    program = exported(*call_of(model, page, sizes, known, kept), page)
    ops = fold_time(ops_of(program, page, sizes), page, model, sizes["T"])

    def small_call(few):
        return call_of(model, page, few, known, cache_of(model, few))

    return Trace(model, folds, sizes, known, ops, masks_of(page, small_call))


def exported(root, inputs, page):
    """The call as a graph. What torch.export cannot record is a matter of the model's file."""
    try:
        # On its way to an error the exporter prints the half of the graph that it has.
        with warnings.catch_warnings(), redirect_stderr(StringIO()):
            warnings.simplefilter("ignore")
            return torch.export.export(root, (), inputs, strict=True)
    except Exception as error:
        lines = re.findall(rf'{re.escape(page.name)}", line (\d+)', str(error))
        place = f"{page.name}, line {lines[-1]}" if lines else page.name
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise UserError(f"{place}: torch.export cannot record a call of this model ({reason})") from error


# What is called ---------------------------------------------------------------------------------------------


class Whole(nn.Module):
    """model(tokens, positions, cache), or whatever its forward asks for."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, **inputs):
        return self.model(**inputs)


class EncoderDecoder(nn.Module):
    def __init__(self, model, num_slots):
        super().__init__()
        self.model, self.num_slots = model, num_slots

    def forward(self, source, tokens, positions):
        cache = self.model.new_cache(self.model.encode(source), self.num_slots)
        return self.model.decode(tokens, positions, cache)


def is_encoder_decoder(model):
    return hasattr(model, "encode") and hasattr(model, "decode")


def cache_of(model, sizes):
    """The cache of a decoder, None for other models."""
    takes = "cache" in inspect.signature(model.forward).parameters
    if is_encoder_decoder(model) or not takes or not hasattr(model, "new_cache"):
        return None
    return model.new_cache(sizes["B"], sizes["S"])


def call_of(model, page, sizes, known, cache):
    """(module, its arguments): the call of each kind of model, see models/__init__.py."""
    tokens = torch.zeros(sizes["B"], sizes["T"], dtype=torch.long, device="meta")
    if is_encoder_decoder(model):
        source = tokens.new_zeros(sizes["B"], sizes["N"])
        root = EncoderDecoder(model, sizes["S"])
        return root.eval(), {"source": source, "tokens": tokens, "positions": tokens.clone()}

    inputs = {}
    shapes = page.parameters(page.method(type(model).__name__, "forward"))
    for name in inspect.signature(model.forward).parameters:
        if name == "cache" and cache is not None:
            inputs[name] = cache
        elif shapes.get(name):
            inputs[name] = argument(name, shapes[name][0], model.config, sizes, known)
    # Positions are where the cache is written; who has no cache may leave them out.
    if "cache" not in inputs:
        inputs.pop("positions", None)
    return Whole(model).eval(), inputs or {"tokens": tokens}


def argument(name, dims, config, sizes, known):
    """An input of the shape that the comment behind the parameter gives it."""
    letters = {**{letter: sizes[letter] for letter in "BTSN"}, **known}
    # Pixels: as many as in the images of training.
    pixels = getattr(config, "image_size", sizes["T"])
    shape = [evaluate(dim, letters) or pixels for dim in dims]
    dtype = torch.bool if "mask" in name else torch.float32 if len(shape) > 2 else torch.long
    return torch.zeros(shape, dtype=dtype, device="meta")


# How many operations ----------------------------------------------------------------------------------------


def count_operations(root, inputs):
    with Counter() as counter, torch.no_grad():
        try:
            root(**inputs)
        except Exception:
            return None  # whatever is wrong, the exporter says it better
    return counter.count


class Counter(TorchDispatchMode):
    """Counts operations, and answers what depends on data, of which the meta device has none."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        if function is torch.ops.aten._local_scalar_dense.default:
            return 1
        if function is torch.ops.aten.nonzero.default:
            return args[0].new_empty((1, args[0].dim()), dtype=torch.long)
        return function(*args, **(kwargs or {}))


# What torch.export says -------------------------------------------------------------------------------------


def ops_of(program, page, sizes):
    """The graph as a list of Op; what is no tensor (assertions) falls away."""
    parameters = {**program.graph_signature.inputs_to_parameters, **program.graph_signature.inputs_to_buffers}
    ops = {}
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if node.op == "output" or value is None:
            continue
        values = [value] if isinstance(value, torch.Tensor) else value
        if not isinstance(values, (list, tuple)) or not isinstance(values[0], torch.Tensor):
            continue
        op = Op(node.name, target_of(node), tuple(sizes.fixed(size) for size in values[0].shape))
        op.whole = not values[0].is_floating_point()
        op.arguments = [ops[argument.name] for argument in node.all_input_nodes if argument.name in ops]
        if node.op == "placeholder":
            op.target = "parameter" if node.name in parameters else "input"
            op.path = parameters.get(node.name, node.name).removeprefix("model.")
        else:
            op.modules = modules_of(node)
            op.frames = frames_of(node, page)
            if is_in_place(node) and op.arguments:
                op.written = op.arguments[0].written or op.arguments[0]
        ops[node.name] = op
    ops = list(ops.values())
    results = next(node for node in program.graph.nodes if node.op == "output").all_input_nodes
    output = [op for op in ops if op.name == results[-1].name]
    return ops + [Op("output", "output", output[0].shape, output)]


def name_of(node):
    return getattr(node.target, "__name__", str(node.target)).split(".")[0]


def target_of(node):
    return name_of(node).strip("_")


def is_in_place(node):
    """Whether an operation writes into its first argument, as torch's names say: index_put_."""
    return name_of(node).endswith("_") and not name_of(node).startswith("_")


def modules_of(node):
    """((path, key), ...); a module that is called twice has two keys."""
    stack = [(path, key) for key, (path, _) in node.meta.get("nn_module_stack", {}).items()]
    return tuple((path.removeprefix("model").lstrip("."), key) for path, key in stack)


def frames_of(node, page):
    frames = re.findall(r'File "([^"]+)", line (\d+), in', node.meta.get("stack_trace") or "")
    lines = [int(line) for file, line in frames if file.endswith(page.name)]
    return tuple(Frame(line, *page.scope(line)) for line in lines if page.scope(line))
