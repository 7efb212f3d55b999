"""What a model has many of, kept once: equal layers, experts, rounds of a loop over time.

Layers are folded in two steps: a run of equal ones is one, and where runs come again in the same order (five
layers with a window and one without, four times) they are a cycle, of which one is kept.
"""

from collections import defaultdict
from dataclasses import dataclass, field
from itertools import groupby
from typing import NamedTuple

from torch import nn


class Run(NamedTuple):
    """Equal layers or experts."""

    members: tuple  # their paths; of experts, those in the layer that was kept
    repeat: int  # how many follow each other, in a cycle those of one turn


class Cycle(NamedTuple):
    """Runs that come again and again in the same order."""

    paths: tuple  # of its runs, in the folded model
    times: int
    num_layers: int  # in one turn


@dataclass
class Folds:
    """What the paths of a folded model stand for in the whole one."""

    runs: dict = field(default_factory=dict)  # {path of what was kept: its Run}
    cycles: list = field(default_factory=list)
    numbers: dict = field(default_factory=dict)  # {name of a list of layers: (how many, numbers of the kept)}

    def kept_of(self, cache):
        """Of a cache with an entry for each layer, those of the layers that were kept; else all of it."""
        if type(cache) in (tuple, list):
            for size, numbers in self.numbers.values():
                if size == len(cache):
                    return tuple(cache[number] for number in numbers)
        return cache

    def cycle_of(self, path):
        return next((cycle for cycle in self.cycles if path in cycle.paths), None)


# Layers -----------------------------------------------------------------------------------------------------


def fold_layers(model):
    """Keep one of each run of equal layers, and one turn of each cycle of runs. Returns the Folds."""
    folds = Folds()
    for name, layers in list(model.named_children()):
        if isinstance(layers, nn.ModuleList) and len(layers):
            kept = []
            for turn, times in cycles_of(runs_of(layers)):
                paths = []
                for group in turn:
                    length = sum(map(len, turn))
                    numbers = [n + length * t for t in range(times) for n in group]
                    paths.append(f"{name}.{len(kept)}")
                    folds.runs[paths[-1]] = Run(tuple(f"{name}.{n}" for n in numbers), len(group))
                    kept.append(group[0])
                if len(turn) > 1:
                    folds.cycles.append(Cycle(tuple(paths), times, length))
            folds.numbers[name] = len(layers), kept
            setattr(model, name, nn.ModuleList(layers[n] for n in kept))
    return folds


def runs_of(layers):
    """[(anatomy, numbers of the layers that have it one after the other)]."""
    kinds = groupby(range(len(layers)), key=[anatomy(layer) for layer in layers].__getitem__)
    return [(kind, list(numbers)) for kind, numbers in kinds]


def cycles_of(runs):
    """[(runs of one turn as lists of numbers, how often it comes)]; a run on its own is a turn of one."""
    found, at = [], 0
    looks = [(kind, len(numbers)) for kind, numbers in runs]
    while at < len(runs):
        width, times = 1, 1
        for size in range(2, (len(runs) - at) // 2 + 1):
            turn, count = looks[at : at + size], 1
            while looks[at + size * count : at + size * (count + 1)] == turn:
                count += 1
            if count > 1:
                width, times = size, count
                break
        found.append(([numbers for _, numbers in runs[at : at + width]], times))
        at += width * times
    return found


def anatomy(layer):
    """What makes two layers look alike: their modules, the shapes of their tensors, their settings."""
    return [
        (path, type(module), settings(module), [(name, p.shape) for name, p in module.named_parameters()])
        for path, module in layer.named_modules()
    ]


def settings(module):
    plain = {name: value for name, value in vars(module).items() if not name.startswith("_")}
    return {name: repr(value) for name, value in plain.items() if not hasattr(value, "untyped_storage")}


# Experts ----------------------------------------------------------------------------------------------------


def fold_experts(module, folds, path=""):
    """Keep one of the equal modules of each list inside a layer. Returns what unfold takes."""
    folded = []
    for name, child in list(module.named_children()):
        inner = f"{path}.{name}" if path else name
        if path and isinstance(child, nn.ModuleList) and is_uniform(child):
            folds.runs[f"{inner}.0"] = Run(tuple(f"{inner}.{n}" for n in range(len(child))), len(child))
            folded.append((module, name, child, f"{inner}.0"))
            child = nn.ModuleList([child[0]])
            setattr(module, name, child)
        folded += fold_experts(child, folds, inner)
    return folded


def is_uniform(parts):
    return len(parts) > 1 and all(anatomy(part) == anatomy(parts[0]) for part in parts)


def unfold(folded, folds):
    """Undo fold_experts."""
    for module, child, parts, path in folded:
        setattr(module, child, parts)
        del folds.runs[path]


# Time -------------------------------------------------------------------------------------------------------


class Loop(NamedTuple):
    """A loop over the tokens of a call."""

    owner: str  # path of the module in whose method it stands; "" in a function of the page
    line: int  # of its `for`


def fold_time(ops, page, model, num_tokens):
    """The ops with one round of each loop that runs once for each of num_tokens tokens.

    The state that a round hands to the next is, in the one that remains, the state before the loop.
    """
    remains, loop_of = {}, {}
    for loop, lines in ops_in_loops(ops, page, model).items():
        if not any(len(same) % num_tokens == 0 for same in lines.values()):
            continue
        for same in lines.values():
            # What the first round leaves out comes once less.
            rounds = next((n for n in (num_tokens, num_tokens - 1) if len(same) % n == 0), 1)
            for n, op in enumerate(same):
                remains[op], loop_of[op] = same[n % (len(same) // rounds)], loop
    folded = [op for op in ops if remains.get(op, op) is op]
    for op in folded:
        op.arguments = list(dict.fromkeys(remains.get(argument, argument) for argument in op.arguments))
        op.written, op.loop = remains.get(op.written, op.written), loop_of.get(op)
    return folded


def ops_in_loops(ops, page, model):
    """{Loop: {what is the same in each round: ops}} of all loops but those over modules."""
    modules, found = dict(model.named_modules()), defaultdict(lambda: defaultdict(list))
    for op in ops:
        loop = outermost_loop(op, page, modules)
        if loop:
            same = tuple(path for path, _ in op.modules), op.frames, op.target
            found[loop][same].append(op)
    return found


def outermost_loop(op, page, modules):
    for frame in op.frames:
        running = [path for path, _ in op.modules if type(modules[path]).__name__ == frame.cls]
        owner = running[-1] if running else ""
        for line, names in page.loops(frame.line):
            over = [getattr(modules[owner], name, None) for name in names] if running else []
            if not any(isinstance(each, nn.ModuleList) for each in over):
                return Loop(owner, line)
    return None
