"""From a model that ran to boxes within boxes: what a diagram shows, for any model, without a word about it.

    box = capture("llama", config)

trace.py runs the model on the meta device, places.py says in which boxes its operations live, here they
become boxes with titles, weights, shapes and lines of source, and edges.py joins them. Equal layers are one
box with `repeat`. What the model never runs in this call (a second head) has a box without edges.
"""

import math
import re
from collections import defaultdict
from dataclasses import asdict

from conversion.tables import LAYOUTS
from conversion.tensor_table import plan
from models import build_model
from structure.capture.blocks import Box
from structure.capture.edges import connect, links_of
from structure.capture.places import BENDS, MAKERS, places_of
from structure.capture.roles import title_of_module
from structure.capture.sizes import Shapes
from structure.capture.trace import trace
from structure.facts import DTYPES, flops_of, stored_bytes


def capture(model_name, config):
    """The box of the whole model."""
    return capture_model(build_model(model_name, config), model_name)


def capture_model(model, model_name=""):
    """The box of a model that stands on the meta device; of its equal layers one remains afterwards."""
    names = hugging_face_names(model, model_name)
    traced = trace(model)
    places = places_of(traced)
    shapes = Shapes(traced, places)
    links = links_of(places)
    boxes = Boxes(traced, places, shapes, links, names)
    root = boxes.make(())
    boxes.add_unused(root)
    connect(root, places, shapes, links)
    return root


def hugging_face_names(model, model_name):
    """{our tensor: what it is, or is a part of, in Hugging Face's files}."""
    if model_name not in LAYOUTS:
        return {}
    layout, config = LAYOUTS[model_name], asdict(model.config)
    steps = plan(layout, config, [name for name, _ in model.named_parameters()])
    return {name: layout.saved_name(step.theirs, config) for step in steps for name in step.ours}


class Boxes:
    """Makes the box of each place: what is in it, and what stands there of it; edges.py joins them."""

    def __init__(self, traced, places, shapes, links, names):
        self.model, self.folds, self.sizes = traced.model, traced.folds, traced.sizes
        self.places, self.page, self.spots, self.ops = places, places.page, places.spots, places.ops
        self.shapes, self.links = shapes, links
        self.names, self.masks = names, traced.masks  # names: Hugging Face's
        self.bytes = stored_bytes(self.model)
        self.counted = {}  # id of a parameter: id of the box that counts it
        self.kept = set()  # the tensors of a cache that a box counts
        self.num_experts = getattr(self.model.config, "num_experts", 0)
        self.num_active = getattr(self.model.config, "num_active_experts", 0)

    def make(self, keys):
        """The box at a place, with all that it holds; a tensor is counted where it comes first."""
        box = self.describe(keys)
        box.children = [self.make((*keys, key)) for key in self.places.inside.get(keys, [])]
        box.parameters += sum(child.parameters * child.repeat for child in box.children)
        box.used += sum(child.used * (child.active or child.repeat) for child in box.children)
        return box

    def describe(self, keys):
        if not keys:
            box = Box("model", "group", "model", definition=self.page.definition(type(self.model).__name__))
            box.doc = self.page.doc
            return box
        spot = self.spots[keys[-1]]
        box = Box(self.renamed(keys[-1]), spot.role, spot.label)
        getattr(self, f"describe_{spot.kind}")(box, spot)
        if spot.ops and spot.kind != "parameter" and not spot.opens:
            computing = [op for op in spot.ops if op.target not in BENDS | MAKERS]
            box.output = self.shapes.shape(computing[-1])
            box.call = self.call_of(computing[-1])
            box.flops = self.flops(spot.ops)
            box.kept = self.kept_by(spot.ops)
            if spot.role == "mask":
                box.attends = self.masks.get(self.lines_of(computing[-1]), ())
            box.times = "T" if any(op.loop for op in computing) else ""
            # What a cache is made with, it keeps: the keys and values of a source.
            methods = {op.frames[0].function for op in computing}
            if methods == {"new_cache"}:
                box.kept = self.terms([math.prod(computing[-1].shape)])
            box.once = bool(self.places.methods) and "decode" not in methods
        return box

    def call_of(self, op):
        """How whoever listens to the whole model finds an op again."""
        where = op.modules[-1:], self.lines_of(op), op.target
        same = [o for o in self.ops if (o.modules[-1:], self.lines_of(o), o.target) == where]
        path = op.modules[-1][0] if op.modules else ""
        return self.members(path) if path else ("",), where[1], op.target, same.index(op)

    def lines_of(self, op):
        """The statements that run it, from the outermost in, each by its first line."""
        return tuple(self.page.statement(frame.line)[0] for frame in op.frames)

    def describe_module(self, box, spot):
        module, cls = self.places.modules[spot.name], type(self.places.modules[spot.name]).__name__
        box.title = title_of_module(module, spot.role)
        box.members = self.members(spot.name)
        run = self.folds.runs.get(spot.name)
        if run:
            box.repeat = run.repeat
            is_chosen = run.repeat == self.num_experts and len(run.members) == run.repeat
            box.active = self.num_active if is_chosen else 0
        if any(inner.rpartition(".")[0].rpartition(".")[0] == spot.name for inner in self.folds.runs):
            box.title = ""  # of several modules in a list, which say themselves what they are
        box.definition, box.doc = self.page.definition(cls), self.page.docstring(cls)
        running = next(op for op in spot.ops or self.ops if self.runs_in(op, spot.name))
        enter = [n for n, frame in enumerate(running.frames) if frame.cls == cls]
        calls = running.frames[: enter[0]] if enter else running.frames
        box.sources = (self.page.source(calls[-1].line),)
        for name, parameter in module.named_parameters(recurse=False):
            if f"{spot.name}.{name}" not in self.spots:
                self.own(box, f"{spot.name}.{name}", parameter)

    def runs_in(self, op, path):
        return op.frames and any(running == path for running, _ in op.modules)

    def describe_method(self, box, spot):
        method = self.page.method(type(self.model).__name__, spot.name)
        box.definition = self.page.definition_of(method)
        lines = {op.frames[0].line for op in self.ops if op.frames and op.frames[0].function == spot.name}
        box.sources = tuple(self.page.source(line) for line in sorted(lines))

    def describe_function(self, box, spot):
        box.definition, box.doc = self.page.definition(spot.name), self.page.docstring(spot.name)
        inside = [op for op in spot.ops if op.frames[spot.depth :]]
        lines = [inside[0].frames[spot.depth - 1].line]
        lines += sorted({op.frames[spot.depth].line for op in inside})
        # What else is in the box: it prepares what the function is given, or joins its results.
        lines += [op.frames[-1].line for op in spot.ops if op not in inside]
        box.sources = tuple(dict.fromkeys(self.page.source(line) for line in lines))

        computing = [op for op in inside if op.target not in BENDS | MAKERS]
        if spot.role == "cache":
            fields = self.page.fields(spot.name)
            box.title = f"{'keys and values' if {'k', 'v'} <= set(fields) else 'state'} of the past"
        elif len(computing) == 1:
            box.title = self.title_of(computing)

    def describe_cycle(self, box, spot):
        box.repeat = spot.cycle.times

    def describe_loop(self, box, spot):
        line = int(spot.name)
        box.title, box.times = self.page.lines[line - 1].strip().rstrip(":"), "T"
        box.sources = (self.page.source(line),)

    def describe_operation(self, box, spot):
        box.title = self.title_of(spot.ops)
        lines = [op.frames[-1].line for op in reversed(spot.ops)]
        box.sources = tuple(dict.fromkeys(self.page.source(line) for line in lines))

    def title_of(self, ops):
        """What operations of one statement compute, as it is written there."""
        if len(ops) > 1:
            return self.page.expression(ops[-1].frames[-1].line, "")
        op, line = ops[0], ops[0].frames[-1].line
        container = self.places.container
        beside = [other for other in self.ops if container[other.name] == container[op.name]]
        same = [other for other in beside if other.frames == op.frames and other.target == op.target]
        return self.page.expression(line, op.target, same.index(op))

    def describe_parameter(self, box, spot):
        op = spot.ops[0]
        path = op.path.rpartition(".")[0]
        readers = [link.reader for link in self.links if link.origin is op]
        box.sources = (self.page.source(readers[0].frames[-1].line),)
        box.output = self.shapes.shape(op)
        module = self.places.modules[path]
        closed = path and self.places.is_leaf(path)
        box.title = title_of_module(module, spot.role) if closed else " × ".join(f"{n:,}" for n in op.shape)
        self.own(box, op.path, self.model.get_parameter(op.path))

    def add_unused(self, root):
        """Boxes for modules that this call does not run: with what they hold, a second head of BERT's."""
        for path, module in self.places.modules.items():
            parameters = dict(module.named_parameters())
            unused = parameters and not any(
                id(parameter) in self.counted for parameter in parameters.values()
            )
            if path and unused:
                cls, role = type(module).__name__, self.places.role(path)
                box = Box(path, role, path.rpartition(".")[2], definition=self.page.definition(cls))
                box.title = f"{title_of_module(module, role)}, not run here".removeprefix(", ")
                box.members, box.doc = (path,), self.page.docstring(cls)
                for name, parameter in parameters.items():
                    self.own(box, f"{path}.{name}", parameter)
                root.children.append(box)
                root.parameters += box.parameters
                root.used += box.used

    def own(self, box, name, parameter):
        """A tensor counts in the first box that has it."""
        ours = self.renamed(name)
        theirs = (self.names[ours],) if ours in self.names else ()
        box.weights += ((ours, tuple(parameter.shape), theirs),)
        if id(parameter) in self.counted:
            box.tied_to = self.counted[id(parameter)]
        else:
            self.counted[id(parameter)] = box.id
            box.parameters += parameter.numel()
            box.used += self.used(parameter)
            box.bytes = {dtype: box.bytes.get(dtype, 0) + self.bytes[name][dtype] for dtype in DTYPES}

    def used(self, parameter):
        """How many numbers of a tensor work for a token: of the experts' in one tensor, the active ones'."""
        together = parameter.dim() > 2 and self.num_active and len(parameter) == self.num_experts
        return parameter.numel() * self.num_active // self.num_experts if together else parameter.numel()

    def renamed(self, key):
        """A key with the number that the layer has in the whole model."""
        for kept, run in self.folds.runs.items():
            if re.match(rf"{re.escape(kept)}(?!\w)", key):
                return run.members[0] + key[len(kept) :]
        return key

    def members(self, path):
        """The modules that a path stands for: in all layers; in an expert, all experts of the first layer."""
        inner = [kept for kept in self.folds.runs if path == kept or path.startswith(kept + ".")]
        if not inner:
            return (path,)
        kept = max(inner, key=len)
        found = [member + path[len(kept) :] for member in self.folds.runs[kept].members]
        # Experts are counted in the layer that was kept.
        return tuple(map(self.renamed, found) if len(inner) > 1 else found)

    def flops(self, ops):
        rounds = [(op, self.sizes["T"] if op.loop else 1) for op in ops]
        return self.terms(number * times for op, times in rounds for number in flops_of(op))

    def kept_by(self, ops):
        """The numbers of the cache's tensors that are written here, each counted where it comes first.

        Whole ones, which say how far a row has come, are not counted: they are few, and never in bf16.
        """
        written = dict.fromkeys(op.written for op in ops if self.is_of_cache(op) and not op.written.whole)
        new = [origin for origin in written if origin not in self.kept]
        self.kept |= set(new)
        return self.terms(math.prod(origin.shape) for origin in new)

    def is_of_cache(self, op):
        """Whether an op writes into what the caller keeps, or what new_cache has made for it."""
        if op.written is None:
            return False
        made = op.written.frames and op.written.frames[0].function == "new_cache"
        return bool(made) or op.written.path.startswith("cache")

    def terms(self, numbers):
        """((coefficient, letters), ...) of a sum."""
        total = defaultdict(int)
        for number in numbers:
            for coefficient, letters in self.sizes.terms(number):
                total[letters] += coefficient
        return tuple((exact(coefficient), letters) for letters, coefficient in total.items())


def exact(fraction):
    """A Fraction as an int, where it is one."""
    return int(fraction) if fraction.denominator == 1 else float(fraction)
