"""A model's calls, recorded: every operation with its module, its shape and its lines of source.

The model stands on the meta device, so that its size costs nothing; of equal layers one is kept; and
torch.export runs it once. What comes out is a list of Op, in the order in which they run.
"""

import inspect
import re
import warnings
from contextlib import redirect_stderr
from dataclasses import dataclass, field
from io import StringIO
from itertools import groupby
from typing import NamedTuple

import torch
from torch import nn

from models.utils.errors import UserError
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


@dataclass
class Trace:
    model: nn.Module  # with one of each run of equal layers
    runs: dict  # {path of a layer that was kept: the paths of all that it stands for, in the whole model}
    sizes: Sizes
    known: dict  # what the letters of shape comments are, where the config says it
    ops: list


def trace(model):
    """Run a model of the meta device once, as it runs when it writes: with a cache where it has one.

    Changes the model: of equal layers one remains.
    """
    page = page_of_class(type(model))
    runs = fold_layers(model)
    sizes = Sizes(model.config, [n for parameter in model.parameters() for n in parameter.shape])
    known = {
        letter: getattr(model.config, name)
        for name, letter in page.letters().items()
        if type(getattr(model.config, name)) is int
    }
    root, inputs = call_of(model, page, sizes, known)
    return Trace(model, runs, sizes, known, ops_of(exported(root, inputs, page), page, model))


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


def call_of(model, page, sizes, known):
    """(module, its arguments): the call of each kind of model that the project knows, see README.md."""
    tokens = torch.zeros(sizes["B"], sizes["T"], dtype=torch.long, device="meta")
    if hasattr(model, "encode") and hasattr(model, "decode"):
        source = tokens.new_zeros(sizes["B"], sizes["N"])
        root = EncoderDecoder(model, sizes["S"])
        return root.eval(), {"source": source, "tokens": tokens, "positions": tokens.clone()}

    inputs = {}
    shapes = page.parameters(page.method(type(model).__name__, "forward"))
    for name in inspect.signature(model.forward).parameters:
        if name == "cache" and hasattr(model, "new_cache"):
            inputs[name] = model.new_cache(sizes["B"], sizes["S"])
        elif shapes.get(name):
            inputs[name] = argument(name, shapes[name][0], model.config, sizes, known)
    # Positions are where the cache is written; who has no cache may leave them out.
    if "cache" not in inputs:
        inputs.pop("positions", None)
    return Whole(model).eval(), inputs or {"tokens": tokens}


def argument(name, dims, config, sizes, known):
    """An input of the shape that the comment behind the parameter gives it."""
    letters = {**known, **{letter: sizes[letter] for letter in "BTSN"}}
    # Pixels: as many as in the images of training.
    pixels = getattr(config, "image_size", sizes["T"])
    shape = [evaluate(dim, letters) or pixels for dim in dims]
    dtype = torch.bool if "mask" in name else torch.float32 if len(shape) > 2 else torch.long
    return torch.zeros(shape, dtype=dtype, device="meta")


# Layers that are equal --------------------------------------------------------------------------------------


def fold_layers(model):
    """Keep the first of each run of equal layers; {its path now: the paths of the run}."""
    runs = {}
    for name, layers in list(model.named_children()):
        if isinstance(layers, nn.ModuleList):
            alike = [list(group) for _, group in groupby(enumerate(layers), lambda pair: anatomy(pair[1]))]
            for place, group in enumerate(alike):
                runs[f"{name}.{place}"] = tuple(f"{name}.{n}" for n, _ in group)
            setattr(model, name, nn.ModuleList(group[0][1] for group in alike))
    return runs


def anatomy(layer):
    """What makes two layers look alike: their modules, the shapes of their tensors, their settings."""
    return [
        (path, type(module), settings(module), [(name, p.shape) for name, p in module.named_parameters()])
        for path, module in layer.named_modules()
    ]


def settings(module):
    plain = {name: value for name, value in vars(module).items() if not name.startswith("_")}
    return {name: repr(value) for name, value in plain.items() if not isinstance(value, torch.Tensor)}


# What torch.export says -------------------------------------------------------------------------------------


def ops_of(program, page, model):
    """The graph as a list of Op; what is no tensor (assertions) and what nobody reads falls away."""
    parameters = {**program.graph_signature.inputs_to_parameters, **program.graph_signature.inputs_to_buffers}
    ops = {}
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if node.op == "output" or value is None:
            continue
        values = [value] if isinstance(value, torch.Tensor) else value
        if not isinstance(values, (list, tuple)) or not isinstance(values[0], torch.Tensor):
            continue
        op = Op(node.name, target_of(node), tuple(values[0].shape))
        op.arguments = [ops[argument.name] for argument in node.all_input_nodes if argument.name in ops]
        if node.op == "placeholder":
            op.target = "parameter" if node.name in parameters else "input"
            op.path = parameters.get(node.name, node.name).removeprefix("model.")
        else:
            op.modules = modules_of(node)
            op.frames = frames_of(node, page)
        ops[node.name] = op
    ops = list(ops.values())
    results = next(node for node in program.graph.nodes if node.op == "output").all_input_nodes
    output = [op for op in ops if op.name == results[-1].name]
    return ops + [Op("output", "output", output[0].shape, output)]


def target_of(node):
    return getattr(node.target, "__name__", str(node.target)).split(".")[0].strip("_")


def modules_of(node):
    """((path, key), ...); a module that is called twice has two keys."""
    stack = [(path, key) for key, (path, _) in node.meta.get("nn_module_stack", {}).items()]
    return tuple((path.removeprefix("model").lstrip("."), key) for path, key in stack)


def frames_of(node, page):
    frames = re.findall(r'File "([^"]+)", line (\d+), in', node.meta.get("stack_trace") or "")
    lines = [int(line) for file, line in frames if file.endswith(page.name)]
    return tuple(Frame(line, *page.scope(line)) for line in lines if page.scope(line))
