"""From a model that ran to boxes within boxes: what a diagram shows, for any model, without a word about it.

    box = capture("llama", config)

trace.py runs the model on the meta device, places.py says in which boxes its operations live, and here they
become boxes with titles, weights, shapes and lines of source, and edges between them. Equal layers are one
box with `repeat`. What the model never runs in this call (a second head) has a box without edges.
"""

import math
import re
from collections import defaultdict
from dataclasses import asdict

from conversion.tables import LAYOUTS
from conversion.tensor_table import plan
from models import build_model
from structure.capture.blocks import Box, Edge, Shape
from structure.capture.places import BENDS, MAKERS, Places, origins
from structure.capture.roles import title_of_module
from structure.capture.sizes import letters_of_numbers, letters_of_specs
from structure.capture.source import page_of_class
from structure.capture.trace import Op, trace
from structure.capture.way import Way
from structure.facts import DTYPES, flops_of, stored_bytes

ASIDE = ("mask", "position", "cache")  # roles that never lead from tokens to logits
CONTENT = ("tokens", "source", "images")


def capture(model_name, config):
    """The box of the whole model."""
    return capture_model(build_model(model_name, config), model_name)


def capture_model(model, model_name=""):
    """The box of a model that stands on the meta device; of its equal layers one remains afterwards."""
    names = hugging_face_names(model, model_name)
    return Capture(trace(model), names).box


def hugging_face_names(model, model_name):
    """{our tensor: what it is, or is a part of, in Hugging Face's files}."""
    if model_name not in LAYOUTS:
        return {}
    layout, config = LAYOUTS[model_name], asdict(model.config)
    steps = plan(layout, config, [name for name, _ in model.named_parameters()])
    return {name: layout.saved_name(step.theirs, config) for step in steps for name in step.ours}


class Capture:
    def __init__(self, traced, names):
        self.model, self.runs, self.sizes, self.known = traced.model, traced.runs, traced.sizes, traced.known
        self.names = names  # Hugging Face's
        self.page = page_of_class(type(self.model))
        self.places = Places(traced, self.page)
        self.ops, self.spots, self.home = self.places.ops, self.places.spots, self.places.home
        self.users = defaultdict(list)
        for op in self.ops:
            for argument in op.arguments:
                self.users[argument].append(op)
        self.bytes = stored_bytes(self.model)
        self.letters = {}  # op: of its shape
        self.fixed = self.known | self.numbers_of_letters()
        self.counted = {}  # id of a parameter: id of the box that counts it
        self.starts = {}  # keys of an open box: the origin of its x

        self.inside = defaultdict(list)  # keys of a box: the keys right inside, as they come to an end
        for op in reversed(self.ops):
            home = self.home.get(op.name, ())
            for depth, key in enumerate(home):
                if key not in self.inside[home[:depth]]:
                    self.inside[home[:depth]].insert(0, key)
        self.links = [link for op in self.ops for link in self.links_to(op)]
        self.box = self.make(())
        self.add_unused()

    def links_to(self, op):
        """(origin, its bends, op) for what an op reads from other boxes."""
        home = self.home.get(op.name, () if op.target == "output" else None)
        if home is None:
            return []
        known = (link for link in origins(op) if link[0].name in self.home or link[0].target == "input")
        return [(*link, op) for link in known if self.home.get(link[0].name, ()) != home]

    # Boxes --------------------------------------------------------------------------------------------------

    def make(self, keys):
        """The box at a place, with all that it holds."""
        box = self.describe(keys)
        box.children = [self.make((*keys, key)) for key in self.inside[keys]]
        if box.children:
            self.add_edges(box, keys)
        box.parameters += sum(child.parameters * child.repeat for child in box.children)
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
            box.output = self.shape(computing[-1])
            box.flops = self.flops(spot.ops)
            # What a cache is made with, it keeps: the keys and values of a source.
            methods = {op.frames[0].function for op in computing}
            if methods == {"new_cache"}:
                box.kept = self.terms([math.prod(computing[-1].shape)])
            box.once = bool(self.places.methods) and "decode" not in methods
        return box

    def describe_module(self, box, spot):
        module, cls = self.places.modules[spot.name], type(self.places.modules[spot.name]).__name__
        box.title = title_of_module(module, spot.role)
        box.members = self.members(spot.name)
        box.repeat = len(self.runs.get(spot.name, [spot.name]))
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
            box.title = "keys and values of the past"
            box.kept = self.terms(math.prod(op.shape) for op in spot.ops if op.target == "index_put")
        elif len(computing) == 1:
            box.title = self.title_of(computing)

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
        readers = [reader for origin, _, reader in self.links if origin is op]
        box.sources = (self.page.source(readers[0].frames[-1].line),)
        box.output = self.shape(op)
        module = self.places.modules[path]
        closed = path and self.places.is_leaf(path)
        box.title = title_of_module(module, spot.role) if closed else " × ".join(f"{n:,}" for n in op.shape)
        self.own(box, op.path, self.model.get_parameter(op.path))

    def add_unused(self):
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
                self.box.children.append(box)
                self.box.parameters += box.parameters

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
            box.bytes = {dtype: box.bytes.get(dtype, 0) + self.bytes[name][dtype] for dtype in DTYPES}

    def renamed(self, key):
        """A key with the number that the layer has in the whole model."""
        for kept, run in self.runs.items():
            if re.match(rf"{re.escape(kept)}(?!\w)", key):
                return run[0] + key[len(kept) :]
        return key

    def members(self, path):
        """All modules of the whole model that a path stands for."""
        for kept, run in self.runs.items():
            if path == kept or path.startswith(kept + "."):
                return tuple(first + path[len(kept) :] for first in run)
        return (path,)

    def flops(self, ops):
        return self.terms(number for op in ops for number in flops_of(op))

    def terms(self, numbers):
        """((coefficient, letters), ...) of a sum."""
        total = defaultdict(int)
        for number in numbers:
            coefficient, letters = self.sizes.term(number)
            total[letters] += coefficient
        return tuple((exact(coefficient), letters) for letters, coefficient in total.items())

    # Edges --------------------------------------------------------------------------------------------------

    def add_edges(self, box, keys):
        """Edges between the boxes right inside of a box, and to and from its surroundings."""
        depth, edges, into = len(keys), {}, defaultdict(list)
        for origin, bends, op in self.links:
            home, reader = self.home.get(origin.name, ()), self.home.get(op.name, ())
            made_here, read_here = self.is_in(home, keys), self.is_in(reader, keys)
            if not made_here and not read_here or op.target == "output" and depth and not made_here:
                continue
            source = home[depth] if made_here else origin
            target = reader[depth] if read_here else "out"
            if source != target:
                edges.setdefault((source, target), self.at_border(origin, bends, op, keys, target))
                first = self.starts.get((*keys, target)) is origin
                if source not in into[target]:
                    into[target].insert(0 if first else len(into[target]), source)

        way = Way(into, self.is_add, self.is_aside)
        self.starts[keys] = way.start
        spine = way.has_residual or any(edge.residual for child in box.children for edge in child.edges)
        ids = dict(zip(self.inside[keys], (child.id for child in box.children)))
        for (source, target), tensor in edges.items():
            start = ids.get(source) or self.gate(source, keys, way.start)
            residual = spine and (source, target) in way.edges
            box.edges.append(Edge(start, ids.get(target, "out"), self.shape(tensor), residual))
            if target == "out" and (source, target) in way.edges:
                box.output = self.shape(tensor)
        box.edges = list(dict.fromkeys(box.edges))

    def is_in(self, home, keys):
        return home[: len(keys)] == keys and len(home) > len(keys)

    def at_border(self, origin, bends, reader, keys, target):
        """The tensor as it crosses into a box, or out of the one around: what bends it inside is not seen."""
        for op in reversed(bends):
            place = self.home.get(op.name) or self.places.around.get(op.name, ())
            if target == "out" and keys:
                outside = place[: len(keys)] == keys
            else:
                outside = place[: len(keys) + 1] != (*keys, target) and not self.same_statement(op, reader)
            if outside:
                return op
        return origin

    def same_statement(self, op, reader):
        """Whether an op stands in the statement of a box that is one operation."""
        if self.spots[self.home[reader.name][-1]].kind != "operation" if reader.name in self.home else True:
            return False
        line, other = op.frames[-1].line, reader.frames[-1].line
        return op.frames[:-1] == reader.frames[:-1] and self.page.source(line) == self.page.source(other)

    def gate(self, origin, keys, start):
        """ "in" for a box's x; for the rest, and for all that enters the model, "in:" and what it is."""
        if origin is start and keys:
            return "in"
        if origin.target == "input":
            return "in:" + re.sub(r"_\d.*", "", origin.path)
        home = self.home[origin.name]
        depth = next(n for n, key in enumerate(home) if keys[n : n + 1] != (key,))
        spot = self.spots[home[depth]]
        names = [part for part in spot.name.split(".") if not part.isdigit()]
        return f"in:{names[-1] if spot.kind == 'module' else spot.label}"

    def is_add(self, source):
        spot = None if isinstance(source, Op) else self.spots.get(source)
        return spot is not None and spot.kind == "operation" and spot.role == "add"

    def is_aside(self, source):
        """Whether a box, or what comes from outside, tells of positions and masks rather than of tokens."""
        if isinstance(source, Op):
            if source.target == "input":
                return source.path not in CONTENT
            source = self.home[source.name][-1]
        spot = self.spots[source]
        if spot.kind == "function" and spot.role == "position":
            return all(origin.target == "input" for origin in self.read_by(spot.ops))
        return spot.kind == "parameter" or spot.kind != "module" and spot.role in ASIDE

    def read_by(self, ops):
        """What ops read that was made elsewhere."""
        return [origin for origin, _, reader in self.links if reader in ops]

    # Shapes -------------------------------------------------------------------------------------------------

    def shape(self, op):
        numbers = self.sizes.numbers(op.shape)
        letters = self.letters_of(op) or letters_of_numbers(numbers, self.fixed)
        return Shape(letters, numbers)

    def numbers_of_letters(self):
        """The letters of comments that are one number all over the model: T tokens of an image."""
        found = defaultdict(set)
        for op in self.ops:
            for letter, number in zip(self.letters_of(op).strip("()").split(", "), op.shape):
                if letter.isidentifier():
                    found[letter].add(number)
        numbers = {letter: self.sizes.numbers(sizes)[0] for letter, sizes in found.items() if len(sizes) == 1}
        return {letter: number for letter, number in numbers.items() if isinstance(number, int)}

    def letters_of(self, op):
        """From the comment of the statement whose value the tensor is, or from an equal shape before."""
        if op not in self.letters:
            self.letters[op] = ""  # whoever asks in between asks in a circle
            specs = self.specs_of(op)
            equal = [other for other in self.before(op) if other.shape == op.shape]
            numbers = self.sizes.numbers(op.shape)
            self.letters[op] = letters_of_specs(specs, op.shape, numbers, self.known) or next(
                filter(None, map(self.letters_of, equal)), ""
            )
        return self.letters[op]

    def specs_of(self, op):
        if op.target == "input":
            return self.page.specs_of_input(type(self.model).__name__, op.path)
        specs = []
        for n in reversed(range(len(op.frames))):
            if not self.is_value(op, n):
                break
            specs += self.page.specs(op.frames[n].line)
        return specs

    def is_value(self, op, n):
        """Whether nothing in the statement of its n-th frame reads the op: it is the statement's value."""
        around, statement = op.frames[:n], self.page.source(op.frames[n].line)
        for user in self.users[op]:
            inside = user.frames[:n] == around and len(user.frames) > n
            if inside and self.page.source(user.frames[n].line) == statement:
                return False
        return True

    def before(self, op):
        """What an op reads; in a function also what that was made of, back to the function's arguments."""
        found, waiting, (depth, functions) = [], list(op.arguments), self.places.functions(op)
        while waiting:
            other = waiting.pop(0)
            if other in found:
                continue
            found.append(other)
            if functions and other.frames[: depth + 1] == op.frames[: depth + 1]:
                waiting += other.arguments
        return found


def exact(fraction):
    """A Fraction as an int, where it is one."""
    return int(fraction) if fraction.denominator == 1 else float(fraction)
