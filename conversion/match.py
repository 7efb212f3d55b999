"""The tensors of a checkpoint beside those our model wants: what to move, and what stands against it."""

import re
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch

from conversion.tables import LAYOUTS
from conversion.tensor_table import layer_count, plan
from models import build_model, config_from_dict
from models.utils.errors import UserError
from models.utils.safetensors_files import DTYPE_NAMES

MAX_PROBLEMS = 20


class Move(NamedTuple):
    """A piece of the work: read some tensors, transform them, write what comes out."""

    reads: tuple  # names
    writes: dict  # name -> shape
    transform: Callable  # list of tensors -> list of tensors


@dataclass
class Match:
    moves: list
    problems: list  # what has to be settled before anything is written
    rows: list  # of the table that --inspect prints
    left_out: Counter  # of tensors of other parts, by what they are for


def match_tensors(source):
    """Everything that has to be done to fill our model, and everything that stands against it."""
    config, layout, entries = source.config, source.layout, source.weights.entries
    num_layers = layer_count(config)
    if num_layers > len(entries):
        raise UserError(f"{source.where}: {num_layers} layers, but there are {len(entries)} tensors in all")
    wanted = wanted_shapes(config, source.where, source.stored)
    steps = plan(layout, config, wanted)
    expected = {step.theirs: their_shape(step, wanted, config) for step in steps}
    skipped = layout.skipped_names(num_layers)
    repeats = layout.repeats(config)
    unfilled = sorted(set(wanted).difference(*(step.ours for step in steps)))

    stored, problems = full_names(layout, entries, {*repeats, *expected, *skipped})
    for name, original in repeats.items():
        if name in stored:
            skipped[name] = f"tied: equal to {original}"
            problems += tied_problems(source, stored[name], stored.get(original))
    for name, computed in layout.computed_tensors(num_layers).items():
        if name in stored and not computed.holds(source.weights.read(stored[name]), config):
            problems.append(
                f"{stored[name]} does not hold {computed.what}, with which {source.where} computes"
            )
    skipped = {name: reason for name, reason in skipped.items() if name in stored}
    left_out = {
        name: what for name in stored for part, what in layout.left_out.items() if name.startswith(part)
    }
    skipped |= left_out
    found = {name: entries[at] for name, at in stored.items() if name not in skipped}
    problems += compare(expected, found, {step.theirs for step in steps if step.row in layout.codes})
    page = f"conversion/tables/{config['model']}.py"
    problems += [f"our {name} {wanted[name]} has no row in {page}, so nothing fills it" for name in unfilled]

    moves = [
        Move(
            (stored[step.theirs],), {name: wanted[name] for name in step.ours}, partial(forward, step, config)
        )
        for step in steps
        if step.theirs in stored
    ]
    rows = [beside(step, found, wanted) for step in steps]
    rows += [
        (name, shown(entries[stored[name]]), "-", "", f"skipped: {why}") for name, why in skipped.items()
    ]
    rows += [(name, shown(found[name]), "?", "", "") for name in found if name not in expected]
    rows += [("?", "", name, str(wanted[name]), "") for name in unfilled]
    return Match(moves, problems, rows, Counter(left_out.values()))


def wanted_shapes(config, where, stored=None):
    """The shape of every tensor of our model by its name; a tied tensor is none of its own.

    stored: the Quantization of codes that are kept, see build_model.
    """
    model_name, built = config_from_dict(config, where)
    state = build_model(model_name, built, stored=stored).state_dict()
    tied = LAYOUTS[model_name].tied(config)
    return {name: tuple(tensor.shape) for name, tensor in state.items() if name not in tied}


def their_shape(step, wanted, config):
    """The shape in which they store a tensor: ours transformed back, on the meta device, without data."""
    ours = [torch.empty(wanted[name], device="meta") for name in step.ours]
    return tuple(step.transform.inverse(ours, config).shape)


def full_names(layout, entries, known):
    """(name as our table has it -> name in the file, problems)."""
    stored, problems = {}, []
    for name in entries:
        full = layout.full_name(name, known)
        if full in stored:
            problems.append(f"{stored[full]} and {name} are the same tensor, stored twice")
        stored[full] = name
    return stored, problems


def tied_problems(source, name, original):
    """A tensor that is tied to another may be stored as well, but must then be equal to it."""
    if original is None:
        return []  # reported as missing
    tensor, same = source.weights.read(name), source.weights.read(original)
    if tensor.dtype == same.dtype and torch.equal(tensor, same):
        return []
    return [f"{name} differs from {original}, though {source.where.name} says that they are tied"]


def compare(expected, found, codes=()):
    """What keeps the tensors found from being those expected, a phrase each; codes: those that are bytes."""
    problems = [f"{name} {shape} is missing" for name, shape in expected.items() if name not in found]
    problems += [
        f"{name} {entry.shape} has no place in the model"
        for name, entry in found.items()
        if name not in expected
    ]
    for name, shape in expected.items():
        if name in found and found[name].shape != shape:
            problems.append(f"{name} has shape {found[name].shape}, where the config asks for {shape}")
        elif name in found and not (found[name].dtype in DTYPE_NAMES.values()) ^ (name in codes):
            problems.append(f"{name} is stored as {found[name].dtype}, which is not supported")
    return problems


def stop_if(problems, folder):
    """One problem makes one line; several make a list, the layers folded, that a person can still read."""
    if not problems:
        return
    lines = [text + (f" (n = {layers})" if layers else "") for text, layers in fold([(p,) for p in problems])]
    if len(lines) == 1:
        raise UserError(f"{folder}: {lines[0]}; nothing was written")
    more = [f"... and {len(lines) - MAX_PROBLEMS} more"] if len(lines) > MAX_PROBLEMS else []
    raise UserError(f"{folder}: {len(problems)} problems, nothing was written:", lines[:MAX_PROBLEMS] + more)


def beside(step, found, wanted):
    """A row of --inspect: their tensor and those of ours that it becomes."""
    return (
        step.theirs,
        shown(found[step.theirs]) if step.theirs in found else "missing",
        "\n".join(step.ours),
        "\n".join(str(wanted[name]) for name in step.ours),
        "" if step.row.transform == "copy" else step.row.transform,
    )


def shown(entry):
    return f"{entry.shape} {str(entry.dtype).removeprefix('torch.')}"


def fold(rows):
    """Rows that differ by the numbers of layers and experts alone, as one row with {n} and {e}.

    A last column has the numbers: "0..5", or "0..5, e = 0..7" where all of these layers have these experts.
    """
    experts, layers = defaultdict(list), defaultdict(list)
    for row in rows:
        n, e = (re.findall(r"\.(\d+)(?=\.)", row[0]) + ["", ""])[:2]
        experts[tuple(map(marked, row)), n].append(e)
    for (row, n), numbers in experts.items():
        layers[row, ranges(numbers)].append(n)
    return [(*row, ranges(numbers) + (f", e = {e}" if e else "")) for (row, e), numbers in layers.items()]


def marked(cell):
    """A cell of tensors' names, with {n} for the first number of each and {e} for the second."""
    names = (re.sub(r"\.\d+\.", ".{n}.", name, count=1) for name in cell.split("\n"))
    return "\n".join(re.sub(r"\.\d+\.", ".{e}.", name) for name in names)


def ranges(numbers):
    """0..2, 5 for 0, 1, 2, 5, which are given as words; "" is none."""
    runs = []
    for n in sorted({int(number) for number in numbers if number}):
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ", ".join(f"{first}..{last}" if first < last else str(first) for first, last in runs)


def forward(step, config, tensors):
    try:
        return step.transform.forward(tensors[0], config)
    except ValueError as error:
        raise UserError(f"{step.theirs}: {error}") from None


def inverse(step, config, tensors):
    return [step.transform.inverse(tensors, config)]
