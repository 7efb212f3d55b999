"""Where each operation of a trace lives: in which boxes, by whose code it is and what it hangs together with.

A box has a key, and the place of an operation is the keys of the boxes around it, outermost first:

    ("layers.0", "layers.0.attn", "layers.0.attn:rotate")

Modules and functions of the model's file make boxes, and so do operations outside of closed boxes, except
for those that only bend an edge (views, casts). An encoder-decoder's methods encode and decode make two more.
"""

import sys
from collections import defaultdict
from dataclasses import dataclass
from itertools import count

from torch import nn

from conversion.config_fields import words
from structure.capture.blocks import LOOP
from structure.capture.folding import Cycle
from structure.capture.roles import HEAVY, label_of_op, role_of_function, role_of_module, role_of_op
from structure.capture.source import page_of_class
from structure.capture.trace import Op

# What changes the looks of a tensor and not its numbers, or not when the model is in use.
BENDS = words("""
    view reshape transpose permute mT t T expand unsqueeze squeeze flatten unflatten slice select narrow
    unbind to type_as contiguous clone alias detach getitem chunk split split_with_sizes dropout float movedim
    repeat_interleave expand_as view_as lift_fresh_copy
""")
# What makes a tensor of a shape alone.
MAKERS = words("""
    arange zeros ones full empty zeros_like ones_like full_like new_zeros new_ones scalar_tensor
""")
METHODS = {"encode": "encoder", "decode": "decoder"}
LEAVES = ("norm", "embedding", "linear", "position", "head")


@dataclass
class Spot:
    """What a key stands for."""

    kind: str  # "module", "method", "function", "operation", "parameter", "cycle", "loop"
    name: str  # of the module, method, function, operation, or parameter; the line of a loop
    label: str
    role: str
    ops: list  # of a box that stays closed all, of an open module or method none
    opens: bool = False
    depth: int = 0  # of a function: where in their frames its operations are inside of it
    cycle: Cycle | None = None  # of layers of several kinds that come in turns


def places_of(traced):
    """The Places of a trace, step by step: each step reads what those before it found."""
    places = Places(traced)
    places.find_containers()
    places.find_methods()
    places.place_functions()
    places.place_operations()
    places.drop_empty()
    places.merge_asides()
    places.place_parameters()
    places.find_insides()
    return places


class Places:
    def __init__(self, traced):
        self.model, self.folds, self.ops = traced.model, traced.folds, reached(traced.ops)
        self.page = page_of_class(type(self.model))
        self.modules = dict(self.model.named_modules())
        self.classes = vars(sys.modules[type(self.model).__module__])
        self.spots = {}  # key: its Spot
        self.container = {}  # op's name: path of the module that it belongs to
        self.methods = {}  # path right below the model: its method that runs it; {} where one runs all
        self.around = {}  # op's name: keys of the boxes around it
        self.home = {}  # op's name: around, and the key of its own box; not of what bends
        self.inside = {}  # keys of a box: the keys right inside, as they come to an end

    # Modules ------------------------------------------------------------------------------------------------

    def find_containers(self):
        for op in self.ops:  # in the order in which they run: a container may be that of an argument
            self.container[op.name] = self.container_of(op)

    def container_of(self, op):
        """The path of the module that an op belongs to, which need not be the one whose forward runs."""
        path = next((path for path, _ in reversed(op.modules) if path), "")
        method = next((frame for frame in reversed(op.frames) if self.is_module(frame.cls)), None)
        if self.is_leaf(path) or method is None or type(self.modules[path]).__name__ == method.cls:
            return path
        # Another module's method: it belongs to the one that made what it reads.
        for argument in op.arguments:
            near = self.container.get(argument.name)
            while near:
                if type(self.modules[near]).__name__ == method.cls:
                    return near
                near = near.rpartition(".")[0]
        return path

    def is_module(self, name):
        cls = self.classes.get(name)
        return isinstance(cls, type) and issubclass(cls, nn.Module)

    def is_leaf(self, path):
        """Whether a module is a box that stays closed."""
        module = self.modules[path]
        if not path or next(module.children(), None) is not None:
            return False
        return type(module).__module__.startswith("torch.nn") or self.role(path) in LEAVES

    def role(self, path):
        return role_of_module(self.modules[path], path.rpartition(".")[2]) if path else "group"

    def find_methods(self):
        outermost = {op.frames[0].function for op in self.ops if op.frames}
        if len(outermost) > 1:
            for op in self.ops:
                inside = [path for path, _ in op.modules if path]
                if op.frames and inside:
                    self.methods.setdefault(inside[0], op.frames[0].function)

    def module_keys(self, path, op):
        """The keys of the modules around a path and of itself; each call of a closed one is a box."""
        parts = path.split(".") if path else []
        paths = [".".join(parts[: n + 1]) for n in range(len(parts))]
        paths = [path for path in paths if not isinstance(self.modules[path], nn.ModuleList)]
        keys = [self.call_key(path, op) if self.is_leaf(path) else path for path in paths]
        for key, path in zip(keys, paths):
            label = path.rpartition(".")[2]
            label = type(self.modules[path]).__name__ if label.isdigit() else label
            opens = not self.is_leaf(path)
            self.spots.setdefault(key, Spot("module", path, label, self.role(path), [], opens))
        keys = self.with_loop(self.with_cycle(keys, paths), paths, op)

        if self.methods:
            inner = paths and not self.is_leaf(paths[0])
            method = self.methods.get(paths[0]) if inner else op.frames[0].function
            key = METHODS.get(method, method)
            key += "()" if key in self.modules else ""
            self.spots.setdefault(key, Spot("method", method, METHODS.get(method, method), "group", [], True))
            keys.insert(0, key)
        return tuple(keys)

    def with_cycle(self, keys, paths):
        """Around the layers of a cycle stands a box for one turn of it."""
        cycle = self.folds.cycle_of(paths[0]) if paths else None
        if cycle is None:
            return keys
        key, label = f"{cycle.paths[0]}:cycle", f"{cycle.num_layers} layers"
        self.spots.setdefault(key, Spot("cycle", label, label, "group", [], True, cycle=cycle))
        return [key, *keys]

    def with_loop(self, keys, paths, op):
        """In the module that loops over time stands a box for one round of it."""
        if op.loop is None or op.loop.owner not in paths or self.is_leaf(op.loop.owner):
            return keys
        place = len(keys) - len(paths) + paths.index(op.loop.owner) + 1
        key = f"{op.loop.owner}:loop"
        if self.spots.get(key, Spot("loop", str(op.loop.line), "", "", [])).name != str(op.loop.line):
            key += f"#{op.loop.line}"
        self.spots.setdefault(key, Spot("loop", str(op.loop.line), LOOP, "recurrence", [], True))
        return [*keys[:place], key, *keys[place:]]

    def call_key(self, path, op):
        """A module that runs twice has two keys; torch.export counts the calls."""
        call = next((key for running, key in op.modules if running == path), "")
        return f"{path}#{int(call.rpartition('@')[2]) + 1}" if "@" in call else path

    # Functions ----------------------------------------------------------------------------------------------

    def functions(self, op):
        """(where they begin, the frames below the last method of a module): functions, records' methods."""
        depth = max((n + 1 for n, frame in enumerate(op.frames) if self.is_module(frame.cls)), default=0)
        return depth, op.frames[depth:]

    def place_functions(self):
        """self.around of all ops: the modules, and the functions whose calls they are part of."""
        calls = defaultdict(list)
        for op in self.ops:
            if not op.frames:
                self.around[op.name] = ()
                continue
            depth, functions = self.functions(op)
            if functions and not self.is_leaf(self.container[op.name]):
                calls[self.container[op.name], op.frames[:depth], functions[0].function].append(op)
            else:
                self.around[op.name] = self.module_keys(self.container[op.name], op)
        for (container, frames, _), ops in calls.items():
            # Equal functions of one line are told apart; a record's method hangs together by its fields.
            is_record = ops[0].frames[len(frames)].cls is not None
            for call in [ops] if is_record else components(ops):
                container = self.container_of_record(call, container, len(frames))
                around = self.module_keys(container, call[0])
                if self.is_left_between(call):
                    self.around.update((op.name, around) for op in call)
                else:
                    self.place_call(call, len(frames), around)

    def is_left_between(self, ops):
        """Whether a function calls a module between its operations: then it is no box, its operations are."""
        after = set()  # what is made outside from what the function has made
        for op in self.ops:
            made = [argument for argument in op.arguments if argument in after]
            if op in ops and made:
                return True
            if op not in ops and (made or any(argument in ops for argument in op.arguments)):
                after.add(op)
        return False

    def container_of_record(self, ops, container, depth):
        """A record's method, the cache's above all, belongs where what it is given was made."""
        if ops[0].frames[depth].cls is None:
            return container
        makers = {self.container[origin.name] for op in ops for origin, _ in origins(op)}
        owners = {path.rpartition(".")[0] if path and self.is_leaf(path) else path for path in makers}
        inner = [path for path in owners if path.startswith(container + "." if container else "") and path]
        return inner[0] if len(inner) == 1 else container

    def place_call(self, ops, depth, around):
        """One call of a function: a closed box, or an open one where the function multiplies matrices."""
        frame = ops[0].frames[depth]
        computing = [op for op in ops if op.target not in BENDS | MAKERS]
        role = "cache" if frame.cls else role_of_function(frame.function, computing)
        label = "cache" if frame.cls else frame.function
        if len(computing) == 1 and not frame.cls:
            label, role = label_of_op(computing[0].target), role_of_op(computing[0].target)
        opens = any(op.target in HEAVY for op in ops)
        name = frame.cls or frame.function
        key = self.new_key(around, label, Spot("function", name, label, role, ops, opens, depth))
        inner = defaultdict(list)
        for op in ops:
            self.around[op.name] = (*around, key)
            if opens and len(op.frames) > depth + 1:
                inner[op.frames[depth], op.frames[depth + 1].function].append(op)
        for part in inner.values():
            for call in components(part):
                self.place_call(call, depth + 1, (*around, key))

    def new_key(self, around, label, spot):
        base = f"{around[-1] if around else 'model'}:{label}"
        keys = (base if n == 1 else f"{base}#{n}" for n in count(1))
        key = next(key for key in keys if key not in self.spots)
        self.spots[key] = spot
        return key

    # Operations ---------------------------------------------------------------------------------------------

    def place_operations(self):
        """self.home of all ops that compute."""
        statements = defaultdict(list)
        for op in self.ops:
            around = self.around[op.name]
            inside = around and not self.spots[around[-1]].opens
            if op.target in ("input", "parameter", "output") or op.target in BENDS and not inside:
                continue
            if inside:
                self.home[op.name] = around
                if op not in self.spots[around[-1]].ops:
                    self.spots[around[-1]].ops.append(op)
            elif op.target not in MAKERS:
                line = self.page.statement(op.frames[-1].line)[0]
                statements[around, op.frames[:-1], line].append(op)
        for (around, *_), ops in statements.items():
            for group in within_statement(ops):
                self.place_group(group, around)

    def place_group(self, ops, around):
        sources = {self.home.get(origin.name) for op in ops for origin, _ in origins(op)}
        made = next(iter(sources), None)
        if ops[0].target == "cat" and len(sources) == 1 and made and self.spots[made[-1]].kind == "function":
            # What only joins a function's results is part of the function.
            self.spots[made[-1]].ops += ops
            home = made
        else:
            telling = telling_op(ops)
            label, role = label_of_op(telling.target), role_of_op(telling.target)
            if telling.written and telling.written.path.startswith("cache"):
                label = role = "cache"
            if role == "attention":
                role = self.role_here(telling, around)
            home = (*around, self.new_key(around, label, Spot("operation", telling.target, label, role, ops)))
        self.home.update({op.name: home for op in ops})

    def role_here(self, op, around):
        """What a product or a softmax is: attention, unless it stands in a recurrence or a feed-forward."""
        roles = [self.spots[key].role for key in around]
        if "recurrence" in roles:
            return "recurrence"
        if "feed_forward" in roles:
            return "operation" if op.target == "softmax" else "linear"
        return "attention"

    def merge_asides(self):
        """What a mask or a rotation is made from, and nothing else is, goes into its box."""
        content = set()  # what depends on weights, as no position and no mask does
        for op in self.ops:
            if op.target == "parameter" or content.intersection(op.arguments):
                content.add(op)
        # From the last to the first, so that what only merged boxes read is merged as well.
        for op in reversed([op for op in self.ops if op.name in self.home and op not in content]):
            home = self.home[op.name]
            readers = {self.home.get(o.name) for o in self.ops if any(x is op for x, _ in origins(o))} - {
                home
            }
            into = readers.pop() if len(readers) == 1 else None
            aside = into and not any(other in content for other in self.spots[into[-1]].ops)
            closed = aside and not self.spots[into[-1]].opens
            if closed and into[:-1] == home[:-1] and self.spots[home[-1]].kind == "operation":
                self.spots[into[-1]].ops[:0] = self.spots.pop(home[-1]).ops
                self.home = {name: into if at == home else at for name, at in self.home.items()}

    def drop_empty(self):
        """A closed box in which nothing computes (dropout, a function of views) is no box."""
        for key, spot in list(self.spots.items()):
            if not spot.opens and all(op.target in BENDS | MAKERS for op in spot.ops):
                del self.spots[key]
                for op in spot.ops:
                    self.home.pop(op.name, None)
                    self.around[op.name] = tuple(k for k in self.around[op.name] if k != key)

    def place_parameters(self):
        """Boxes for tensors that are read outside of closed modules: tables of positions, class tokens."""
        for op in self.ops:
            if op.target == "parameter":
                readers = [o for o in self.ops if any(origin is op for origin, _ in origins(o))]
                if any(self.container[reader.name] and self.reads_own(reader) for reader in readers):
                    continue
                owner, _, name = op.path.rpartition(".")
                closed = bool(owner) and self.is_leaf(owner)
                path = owner if closed else op.path
                module = self.modules[owner]
                role = role_of_module(module, path.rpartition(".")[2])
                role = "embedding" if role == "group" else role
                around = self.module_keys(owner.rpartition(".")[0] if closed else owner, readers[0])
                self.spots[path] = Spot("parameter", op.path, path.rpartition(".")[2], role, [op])
                self.home[op.name] = (*around, path)

    def reads_own(self, op):
        return self.is_leaf(self.container[op.name])

    # Boxes --------------------------------------------------------------------------------------------------

    def find_insides(self):
        for op in reversed(self.ops):
            home = self.home.get(op.name, ())
            for depth, key in enumerate(home):
                inside = self.inside.setdefault(home[:depth], [])
                if key not in inside:
                    inside.insert(0, key)


# Operations among each other --------------------------------------------------------------------------------


def reached(ops):
    """The ops that the output depends on, and those that a cache keeps for the next call.

    What is only asked for its shape or dtype does not count.
    """
    needed, waiting = set(), [ops[-1]]
    waiting += [op for op in ops if op.written and op.written.path.startswith("cache")]
    while waiting:
        op = waiting.pop()
        if op not in needed:
            needed.add(op)
            kept = 0 if op.target in MAKERS else 1 if op.target in BENDS else len(op.arguments)
            op.arguments = op.arguments[:kept]
            waiting += op.arguments
    return [op for op in ops if op in needed]


def origins(op: Op):
    """(op that computed, what bent it on the way, first to last) for each tensor that an op reads."""
    found = []
    for argument in op.arguments if op.target not in BENDS | MAKERS else []:
        bends = []
        while argument.target in BENDS and argument.arguments:
            bends.insert(0, argument)
            argument = argument.arguments[0]
        found.append((argument, bends))
    return found


def components(ops):
    """The ops in groups that hang together."""
    group = {op: {op} for op in ops}
    for op in ops:
        for argument in op.arguments:
            if argument in group:
                unite(group, argument, op)
    return distinct(group)


def within_statement(ops):
    """What one statement computes: around a matrix product, or with a number alone, it is one box."""
    group = {op: {op} for op in ops}
    for op in ops:
        for origin, _ in origins(op):
            if origin in group:
                weighs = any(member.target in HEAVY for member in group[origin] | {op})
                if weighs or is_plain(op) or is_plain(origin):
                    unite(group, origin, op)
    return distinct(group)


def unite(group, first, second):
    union = group[first] | group[second]
    group.update(dict.fromkeys(union, union))


def distinct(group):
    parts = {id(members): [op for op in group if op in members] for members in group.values()}
    return list(parts.values())


def is_plain(op):
    """A division by a number, a negation: arithmetic with one tensor."""
    return len(op.arguments) == 1 and op.target in ("mul", "div", "bitwise_not", "neg", "add", "sub")


def telling_op(ops):
    heavy = [op for op in ops if op.target in HEAVY]
    return (heavy or [op for op in ops if not is_plain(op)] or ops)[-1]
